"""``senet.accelerate`` on other people's networks: the same function in both modes, and an honest report."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet
from helpers.accelerated import in_sweeps
from helpers.acceleration import instances, report_of
from helpers.images import images
from helpers.networks import all_names, relative, settled
from senet import SEConfig
from senet.acceleration.fold import ALONE, EARLY, LATE, PROJECTED
from senet.acceleration.modules import FoldedConv2d

BEFORE = (PROJECTED, ALONE)
# network → (forms of its gates in inference, how many gates, how many of them are swept in training)
FAMILIES = {
    "timm:seresnet18": ((LATE,), 8, 8),
    "timm:seresnet50": ((EARLY,), 16, 16),
    "timm:seresnext26d_32x4d": ((EARLY,), 8, 8),
    "timm:seresnextaa101d_32x8d": ((EARLY,), 33, 33),
    "timm:legacy_seresnet18": ((LATE,), 8, 8),
    "timm:legacy_seresnet50": ((EARLY,), 16, 16),
    "timm:legacy_seresnext26_32x4d": ((EARLY,), 8, 8),
    "timm:senet154": ((EARLY,), 50, 50),
    "timm:regnety_002": (BEFORE, 13, 0),
    "timm:efficientnet_b0": (BEFORE, 16, 0),
    "timm:tf_efficientnet_b0": (BEFORE, 16, 0),
    "timm:efficientnetv2_rw_t": (BEFORE, 29, 0),
    "timm:mobilenetv3_small_100": (BEFORE, 9, 0),
    "timm:mobilenetv3_large_100": (BEFORE, 8, 0),
    "timm:semnasnet_075": (BEFORE, 8, 0),
    "timm:rexnet_100": ((LATE,), 13, 0),
    "timm:seresnet33ts": (BEFORE, 10, 0),
    "timm:ghostnet_100": ((LATE, *BEFORE), 7, 2),
    "torchvision:efficientnet_b0": (BEFORE, 16, 0),
    "torchvision:efficientnet_v2_s": (BEFORE, 30, 0),
    "torchvision:mobilenet_v3_small": (BEFORE, 9, 0),
    "torchvision:mobilenet_v3_large": (BEFORE, 8, 0),
    "torchvision:regnet_y_400mf": (BEFORE, 16, 0),
    "attached:resnet18": ((LATE,), 8, 8),
    "attached:mobilenet_v2": (BEFORE, 17, 0),
}
# Without gates that are known, or with other attention: they must run, as one graph, whatever is done to them.
OTHERS = [
    *("timm:mnasnet_100", "timm:convnext_atto", "timm:densenet121", "timm:hrnet_w18_small", "timm:ecaresnet26t"),
    *("timm:nf_regnet_b0", "timm:skresnet18", "timm:resnest14d", "timm:hardcorenas_a", "timm:mixnet_s"),
]
QUICK = {"timm:seresnet18", "timm:mobilenetv3_small_100", "attached:resnet18"}
NAMES = all_names(QUICK, [*FAMILIES, *OTHERS])


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


def assert_as_expected(report, name, mode):
    assert report.graphs == {mode: 1}
    assert report.breaks == []
    if name in FAMILIES:
        forms, count, swept = FAMILIES[name]
        if mode == "inference":
            assert len(report.inference) == count
            assert set(report.inference.values()) <= set(forms)
            assert report.left == {}
        else:
            assert sum(gate in report.training for gate in gates_of(name)) == swept


def gates_of(name):
    return {gate.name for gate in senet.find_gates(made(name))}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_function_in_eval_mode(name):
    model, x = made(name), images(batch=2)
    with torch.no_grad():
        exact = model(x)
        assert relative(senet.accelerate(model, "reference")(x), exact) < 1e-9
        single = copy.deepcopy(model).float()
        own_error = relative(single(x.float()).double(), exact)
        fast = senet.accelerate(single)
        assert relative(fast(x.float()).double(), exact) <= max(1e-5, 4 * own_error)
    assert_as_expected(fast.acceleration, name, "inference")
    assert set(fast.acceleration.inference) <= {n for n, _ in model.named_modules()}
    assert type(fast) is type(model)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_function_and_gradients_in_training(name):
    model = made(name)
    fast = without_dropping(senet.accelerate(model).train())
    without_dropping(model.train())
    x = images(batch=4)
    with in_sweeps():
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
    assert_as_expected(fast.acceleration, name, "training")


def test_stochastic_depth_draws_the_same_numbers():
    torch.manual_seed(0)
    model = timm.create_model("seresnet18", drop_path_rate=0.5, num_classes=7, layers=(1, 1, 1, 1)).double().train()
    fast = senet.accelerate(model)
    outputs = []
    for net in (model, fast):
        torch.manual_seed(1)
        with in_sweeps() if net is fast else senet.use_backend("reference"):
            outputs.append(net(images(batch=4)))
    assert relative(outputs[1], outputs[0]) < 1e-9


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ecaresnet26t", "does not follow a fully connected layer"),
        ("ese_vovnet19b_dw", "its excitation is a single layer"),
    ],
)
def test_other_attention_is_listed(name, reason):
    model = made(f"timm:{name}")
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        assert relative(fast(images()), model(images())) < 1e-9
    report = fast.acceleration
    assert report.inference == {}
    assert len(report.left) == sum(type(m).__name__ in ("EcaModule", "EffectiveSEModule") for m in model.modules())
    assert all(why for why in report.left.values())
    assert any(reason in why for why in report.left.values())
    assert reason in str(report)


def test_activations_are_in_the_convolution(monkeypatch):
    convolutions = instances(monkeypatch, FoldedConv2d)
    model = timm.create_model("mobilenetv3_small_100").eval()
    report_of(senet.accelerate(model), images(dtype=torch.float32))
    assert {conv.activation for conv in convolutions} == {None, "relu", "hardswish"}
    assert len(convolutions) >= sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
