"""``senet.accelerate`` on other people's networks: the same function in both modes, and an honest report."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet
from helpers.acceleration import modules_of
from helpers.images import images
from helpers.messages import one_line
from helpers.networks import all_names, relative, settled
from senet import SEConfig
from senet.acceleration.fuse import ALONE, EARLY, LATE, PROJECTED
from senet.acceleration.modules import FoldedConv2d
from senet.acceleration.report import known_gates
from senet.nn.residual_tail import ResidualTail
from senet.ops import reference
from senet.ops.conv import early_gate
from senet.ops.csrc import build

# network → (form of its gates, how many, how many are swept in training)
FAMILIES = {
    "timm:seresnet18": (LATE, 8, 8),
    "timm:seresnet50": (EARLY, 16, 16),
    "timm:seresnext26d_32x4d": (EARLY, 8, 8),
    "timm:seresnextaa101d_32x8d": (EARLY, 33, 33),
    "timm:legacy_seresnet18": (LATE, 8, 0),
    "timm:legacy_seresnet50": (EARLY, 16, 16),
    "timm:legacy_seresnext26_32x4d": (EARLY, 8, 8),
    "timm:senet154": (EARLY, 50, 50),
    "timm:regnety_002": (PROJECTED, 13, 0),
    "timm:efficientnet_b0": (PROJECTED, 16, 0),
    "timm:tf_efficientnet_b0": (PROJECTED, 16, 0),
    "timm:efficientnetv2_rw_t": (PROJECTED, 29, 0),
    "timm:mobilenetv3_small_100": (PROJECTED, 9, 0),
    "timm:mobilenetv3_large_100": (PROJECTED, 8, 0),
    "timm:semnasnet_075": (PROJECTED, 8, 0),
    "timm:rexnet_100": (LATE, 13, 0),
    "timm:seresnet33ts": (PROJECTED, 10, 0),
    "torchvision:efficientnet_b0": (PROJECTED, 16, 0),
    "torchvision:efficientnet_v2_s": (PROJECTED, 30, 0),
    "torchvision:mobilenet_v3_small": (PROJECTED, 9, 0),
    "torchvision:mobilenet_v3_large": (PROJECTED, 8, 0),
    "torchvision:regnet_y_400mf": (PROJECTED, 16, 0),
    "attached:resnet18": (LATE, 8, 8),
    "attached:mobilenet_v2": (PROJECTED, 17, 0),
}
QUICK = {
    "timm:seresnet18",
    "timm:legacy_seresnext26_32x4d",
    "timm:regnety_002",
    "timm:mobilenetv3_small_100",
    "torchvision:mobilenet_v3_small",
    "attached:resnet18",
}
NAMES = all_names(QUICK, FAMILIES)
SWEPT = [p for p in NAMES if FAMILIES[p.values[0]][2]]


def made(name):
    """A network in float64 with the statistics of real maps, in eval mode; attached gates are not neutral."""
    torch.manual_seed(0)
    source, _, model = name.partition(":")
    net = timm.create_model(model, num_classes=7) if source == "timm" else getattr(torchvision.models, model)()
    if source == "attached":
        senet.attach(net, SEConfig(reduction=4), example_input=images(batch=1, dtype=torch.float32))
    for module in net.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0  # of dropout that is a function and no module
    return settled(net)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_function_in_eval_mode(name):
    form, count, swept = FAMILIES[name]
    model, x = made(name), images()
    with torch.no_grad():
        exact = model(x)
        assert relative(senet.accelerate(model, "reference")(x), exact) < 1e-9
        single = copy.deepcopy(model).float()
        own_error = relative(single(x.float()).double(), exact)
        fast = senet.accelerate(single)
        assert relative(fast(x.float()).double(), exact) <= max(1e-5, 4 * own_error)
        assert relative(fast(x[:1].float()).double(), exact[:1]) <= max(1e-5, 4 * own_error)
    report = fast.acceleration
    assert set(report.inference.values()) == {form}
    assert (len(report.inference), len(report.training), report.left) == (count, swept, {})
    assert set(report.training) <= set(report.inference) <= {n for n, _ in model.named_modules()}
    assert list(fast.state_dict()) == list(model.state_dict())


def gradients(net, x):
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def without_dropping(net):
    """What draws random numbers would make two runs differ."""
    for module in net.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ in ("DropPath", "StochasticDepth"):
            module.eval()
    return net


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_function_and_gradients_in_training(name):
    model = made(name)
    fast = without_dropping(senet.accelerate(model).train())
    without_dropping(model.train())
    x = images(batch=4)
    # On small maps PyTorch's own operations are taken: ask for the sweeps.
    with senet.use_backend("native"):
        out, got = gradients(fast, x)
    with senet.use_backend("reference"):
        expected, want = gradients(model, x)
    assert relative(out, expected) < 1e-9
    assert got.keys() == want.keys()
    largest = max(g.abs().max() for g in want.values())
    for key, gradient in want.items():
        assert (got[key] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-12 * largest, key
    for (key, a), b in zip(fast.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=key)  # the running statistics too


@pytest.mark.parametrize("name", SWEPT)
def test_training_calls_the_residual_tail(name, monkeypatch):
    fast = senet.accelerate(made(name)).train()
    calls = []
    forward = ResidualTail.forward
    monkeypatch.setattr(ResidualTail, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    fast(images(batch=2))
    assert len(calls) == FAMILIES[name][2]
    with_shortcut = [args for args in calls if args[4] is not None]
    assert len(with_shortcut) == len(calls)  # the sum is in the sweep
    assert all(args[0].activation for args in calls)


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_what_stands_between_the_fully_connected_layers(activation):
    generator = torch.Generator().manual_seed(0)
    w1, b1, w2 = (torch.randn(*size, generator=generator) for size in ((5, 12), (5,), (12, 5)))
    x = torch.randn(3, 12, 5, 7, generator=generator)
    gate = early_gate.gate_of(x, reference.FullyConnected(w1, b1, w2, None, "hard_sigmoid", activation), "native")
    delta = {"relu": nn.ReLU(), "silu": nn.SiLU(), "hardswish": nn.Hardswish()}[activation]
    expected = nn.functional.hardsigmoid(delta(x.mean((2, 3)) @ w1.t() + b1) @ w2.t())
    torch.testing.assert_close(gate, expected, rtol=1e-5, atol=1e-6)


def test_stochastic_depth_draws_the_same_numbers():
    torch.manual_seed(0)
    model = timm.create_model("seresnet18", drop_path_rate=0.5, num_classes=7).double().train()
    fast = senet.accelerate(model)
    assert len(fast.acceleration.training) == 8
    outputs = []
    for net in (model, fast):
        torch.manual_seed(1)
        with senet.use_backend("native" if net is fast else "reference"):
            outputs.append(net(images(batch=4)))
    assert relative(outputs[1], outputs[0]) < 1e-9


def test_modes_keys_and_weights_both_ways():
    model = made("timm:seresnet18").float()
    fast, x = senet.accelerate(model), images(dtype=torch.float32)
    other = made("timm:seresnet18").float()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    fast.load_state_dict(other.state_dict(), strict=True)
    with torch.no_grad():
        assert relative(fast(x), other(x)) < 1e-5
        assert relative(fast(x), model(x)) > 1e-3
    model.load_state_dict(fast.state_dict(), strict=True)
    fast.train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.01)
    fast(x).square().mean().backward()
    optimizer.step()
    fast.eval()
    model.load_state_dict(fast.state_dict(), strict=True)
    with torch.no_grad():
        assert relative(fast(x), model(x)) < 1e-5
        fresh = {k: v.clone() for k, v in other.state_dict().items()}
        fast.load_state_dict(fresh, assign=True)
        assert relative(fast(x), other(x)) < 1e-5


def test_a_hook_put_on_later_is_called_in_training():
    fast = senet.accelerate(made("timm:seresnet18")).train()
    seen = []
    handle = fast.layer1[0].register_forward_hook(lambda *args: seen.append(args))
    fast(images(batch=2))
    handle.remove()
    fast(images(batch=2))
    assert len(seen) == 1


def test_a_module_that_is_replaced_later_is_used_in_training():
    model = made("timm:seresnet18").train()
    fast = senet.accelerate(model)
    for network in (model, fast):
        network.layer1[0].se = nn.Identity()
    plain = fast(images(batch=2))
    assert len(fast.acceleration.training) == 7
    assert relative(plain, model(images(batch=2))) < 1e-12


def test_training_compiles_as_one_graph():
    torch.manual_seed(0)
    model = timm.create_model("seresnet18", num_classes=7, layers=(1, 1, 1, 1))
    fast, x = senet.accelerate(model.train()), images(batch=2, dtype=torch.float32)
    expected = fast(x)
    assert relative(torch.compile(fast, fullgraph=True, backend="eager")(x), expected) < 1e-4


class Block(nn.Module):
    """SE as many write it: linear layers, a flattened average."""

    def __init__(self, scaled=1.0, last=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.se = Gate(scaled, last)

    def forward(self, x):
        return self.se(self.norm(self.conv(x))).mean((2, 3))


class Gate(nn.Module):
    def __init__(self, scaled, last):
        super().__init__()
        self.pool, self.squeeze, self.act = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2), nn.ReLU(inplace=True)
        self.expand, self.gate, self.scaled = nn.Linear(2, 8, bias=False), last or nn.Sigmoid(), scaled

    def forward(self, x):
        z = self.expand(self.act(self.squeeze(self.pool(x).flatten(1))))
        return x * self.scaled * self.gate(z).view(x.shape[0], -1, 1, 1)


def test_a_gate_of_ones_own_is_known_by_what_it_computes():
    torch.manual_seed(0)
    model, x = Block().double().eval(), images()
    nn.init.zeros_(model.se.expand.weight)  # agrees with any activation, as long as it is not probed with other weights
    fast = senet.accelerate(model, "reference")
    assert fast.acceleration.inference == {"se": LATE}
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
    fast.train()
    model.train()
    with senet.use_backend("native"):
        _, got = gradients(fast, x)
    for key, gradient in gradients(model, x)[1].items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("model", [Block(scaled=3.0), Block(last=nn.Softplus())])
def test_what_only_looks_like_a_gate_is_left_and_listed(model):
    model = model.double().eval()
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()), rtol=1e-12, atol=1e-12)
    assert fast.acceleration.inference == {}
    assert set(fast.acceleration.left) == {"se"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ecaresnet26t", "multiplies feature maps, but not with a supported gate"),
        ("ese_vovnet19b_dw", "its excitation is a single layer"),
    ],
)
def test_other_attention_is_listed(name, reason):
    model = made(f"timm:{name}")
    fast = senet.accelerate(model, "reference")
    report = fast.acceleration
    assert report.inference == {}
    assert report.ordinary_training == "there is no gate"
    assert len(report.left) == sum(type(m).__name__ in ("EcaModule", "EffectiveSEModule") for m in model.modules())
    assert all(reason in why for why in report.left.values())
    assert reason in str(report)
    with torch.no_grad():
        assert relative(fast(images()), model(images())) < 1e-9


def test_every_gate_of_a_family_is_known_with_its_activation():
    known, left = known_gates(timm.create_model("efficientnet_b0"))
    assert {(gate.activation, gate.gate_name, gate.trains) for gate in known.values()} == {("silu", "sigmoid", False)}
    assert left == {}
    known, _ = known_gates(torchvision.models.mobilenet_v3_small())
    assert {(gate.activation, gate.gate_name) for gate in known.values()} == {("relu", "hard_sigmoid")}
    known, _ = known_gates(timm.create_model("rexnet_100"))  # a norm within the excitation
    assert {(gate.activation, gate.norm is not None, gate.trains) for gate in known.values()} == {("relu", True, False)}


def test_activations_are_in_the_convolution():
    fast = senet.accelerate(timm.create_model("mobilenetv3_small_100").eval())
    assert {conv.activation for conv in modules_of(fast, FoldedConv2d)} == {None, "relu", "hardswish"}
    assert not modules_of(fast, nn.BatchNorm2d)


def test_a_gate_that_somebody_else_reads_before_is_not_applied_in_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.se = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), senet.SqueezeExcite(8)

        def forward(self, x):
            u = torch.relu(self.a(x))
            return self.b(self.se(u)) + u

    torch.manual_seed(0)
    model, x = Twice().eval(), images(dtype=torch.float32)
    fast = senet.accelerate(model)
    with torch.no_grad():
        assert relative(fast(x), model(x)) < 1e-5
    assert fast.acceleration.inference == {"se": PROJECTED}
    alone = senet.accelerate(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), senet.SqueezeExcite(8)).eval())
    assert alone.acceleration.inference == {"2": ALONE}


@pytest.mark.parametrize("se", [True, False])
def test_a_map_of_which_a_view_is_kept_is_not_overwritten(se):
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.se = senet.SqueezeExcite(8) if se else nn.Identity()

        def forward(self, x):
            u = torch.relu(self.a(x))
            half = u[:, :4]
            return (self.b(self.se(u)) if se else self.b(u) + u).sum((2, 3))[:, :4] + half.sum((2, 3))

    torch.manual_seed(0)
    model, x = View().eval(), images(dtype=torch.float32)
    with torch.no_grad():
        assert relative(senet.accelerate(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("se", [True, False])
def test_a_sum_that_broadcasts(se):
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, stride=2)
            self.se = senet.SqueezeExcite(8) if se else nn.Identity()

        def forward(self, x):
            pooled = self.a(x).amax((2, 3), keepdim=True) if se else self.a(x[:, :, :1, :1])
            return torch.relu(self.se(self.b(x)) + pooled)

    torch.manual_seed(0)
    model, x = Broadcast().eval(), images(dtype=torch.float32)
    with torch.no_grad():
        assert relative(senet.accelerate(model)(x), model(x)) < 1e-5
        assert relative(senet.accelerate(model)(x[:, :, :3, :3]), model(x[:, :, :3, :3])) < 1e-5


def test_hooked_networks_are_refused_in_one_line():
    model = timm.create_model("seresnet18").eval()
    handle = model.layer1[0].bn2.register_forward_hook(lambda *args: None)
    with pytest.raises(senet.InputError, match=one_line("'layer1.0.bn2' has a hook")):
        senet.accelerate(model)
    handle.remove()
    senet.accelerate(model)
