"""What happens to an accelerated network afterwards, and calls that are out of the ordinary."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import senet
from helpers.images import maps
from helpers.messages import one_line
from helpers.threads import run_together
from senet.acceleration.fuse import EARLY
from senet.ops.conv.native import PackedConv2d


class Net(nn.Module):
    """Two blocks with gates, an optional argument, a constant and a kept map."""

    def __init__(self):
        super().__init__()
        self.first = Block(3)
        self.second = Block(8)

    def forward(self, x, mask=None):
        y = self.second(self.first(x))
        return y if mask is None else y * mask


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), senet.SqueezeExcite(8)
        self.drop, self.slope, self.last = nn.Dropout(0.5), 1.0, None

    def forward(self, x):
        self.last = F.relu(self.se(self.bn(self.conv(x)))) * self.slope
        return self.drop(self.last)


def made():
    torch.manual_seed(0)
    return Net().eval()


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def zero(net):
    net.second.conv.weight = nn.Parameter(torch.zeros_like(net.second.conv.weight))


def scale_by_data(net):
    net.first.conv.weight.data = net.first.conv.weight.data * 2


def scale_as_vector(net):
    flat = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(flat * 1.5, net.parameters())


def lose_digits(net):
    net.first.bfloat16().float()


def assign_from_outside(net):
    state = {f"0.{key}": value * 1.5 for key, value in net.state_dict().items() if value.is_floating_point()}
    nn.Sequential(net).load_state_dict(state, strict=False, assign=True)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module inside": lambda net: setattr(net.first, "se", nn.Identity()),
    "a parameter inside": zero,
    "tensor.data": scale_by_data,
    "a vector of parameters": scale_as_vector,
    "a part's type": lose_digits,
    "a state from outside": assign_from_outside,
    "a constant of the forward": lambda net: setattr(net.second, "slope", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_inside_are_seen_in_eval_mode(change):
    model = made()
    fast = senet.accelerate(model)
    with torch.no_grad():
        before = fast(maps())
        change(fast)
        change(model)
        assert_same(fast(maps()), model(maps()))
        assert (fast(maps()) - before).abs().max() > 1e-4


def test_a_head_inside_a_head_is_replaced():
    fast = senet.accelerate(timm.create_model("regnety_002", num_classes=5).eval())
    fast.reset_classifier(2)  # sets an attribute of model.head
    with torch.no_grad():
        assert fast(maps(1, 3, 32, 32)).shape == (1, 2)


def test_functional_call_takes_the_weights_that_it_is_given():
    model = made()
    fast = senet.accelerate(model)
    weights = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    with torch.no_grad():
        assert_same(
            torch.func.functional_call(fast, weights, (maps(),)),
            torch.func.functional_call(model, weights, (maps(),)),
        )
        assert_same(fast(maps()), model(maps()))


def test_modes_of_parts_are_kept_and_followed():
    model = made()
    model.second.drop.train()  # Monte-Carlo dropout
    fast = senet.accelerate(model)
    x = maps(4, 3, 32, 32)
    with torch.no_grad():
        assert fast.second.drop.training
        assert len({fast(x).sum().item() for _ in range(3)}) == 3
        fast.second.drop.eval()
        assert_same(fast(x), fast(x))
        fast.first.drop.train()
        assert len({fast(x).sum().item() for _ in range(3)}) == 3
    model.train()
    for bn in (model.first.bn, model.second.bn):
        bn.eval()
    assert [m.training for m in senet.accelerate(model).modules()] == [m.training for m in model.modules()]


def test_gradients_that_are_asked_for_in_eval_mode_are_computed_and_kept():
    model = made()
    model.first.requires_grad_(False)
    fast = senet.accelerate(model)
    assert not fast(maps()).requires_grad
    fast.second.conv.weight.requires_grad_(True)
    for net in (fast, model):
        net(maps()).square().sum().backward()
    assert_same(fast.second.conv.weight.grad, model.second.conv.weight.grad)
    assert fast.train().second.conv.weight.requires_grad
    assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in model.parameters()]
    fast.eval().requires_grad_(False)
    assert not any(p.requires_grad for p in fast.train().parameters())


def test_a_trace_leaves_no_symbol_and_no_random_state_behind():
    model = made().train()
    state = torch.get_rng_state()
    fast = senet.accelerate(model)
    assert fast.first.last is None
    assert torch.equal(state, torch.get_rng_state())
    pickle.dumps(fast.eval())


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), senet.SqueezeExcite(8)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.training and torch.rand(1).item() < 0.5 else self.se(y)


def test_a_path_that_is_drawn_is_drawn_each_time():
    fast = senet.accelerate(Draws().train())
    assert "random numbers" in fast.acceleration.ordinary_training
    torch.manual_seed(0)
    assert len({fast(maps()).sum().item() for _ in range(12)}) == 2


def test_arguments_by_name_and_optional_ones():
    model = made()
    fast = senet.accelerate(model)
    mask = maps(2, 1, 6, 5, seed=1)
    with torch.no_grad():
        assert_same(fast(x=maps()), model(maps()))
        assert_same(fast(maps(), mask), model(maps(), mask))
        assert_same(fast(maps(), mask=mask), model(maps(), mask))
    with pytest.raises(TypeError, match="'x'"):
        fast()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.se, self.bn = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 8, 1),
            senet.SqueezeExcite(8),
            nn.BatchNorm2d(8),
        )

    def forward(self, x, y):
        return self.se(x=self.bn(input=self.a(input=x))) + self.b(y)


def test_two_inputs_and_modules_that_are_called_by_keyword():
    torch.manual_seed(0)
    model = Pair().eval()
    fast = senet.accelerate(model)
    with torch.no_grad():
        assert_same(fast(maps(), y=maps(seed=1)), model(maps(), maps(seed=1)))
    assert fast.acceleration.inference == {"se": EARLY}
    model.train()
    fast.train()
    with senet.use_backend("native"):
        assert_same(fast(maps(), maps(seed=1)), model(maps(), maps(seed=1)))


def test_what_looks_at_operations_finds_them():
    model = made()
    fast, x = senet.accelerate(model), maps()
    assert_same(torch.func.vmap(fast)(x[:, None]), torch.func.vmap(model)(x[:, None]))
    block = made().first
    assert_same(torch.fx.symbolic_trace(senet.accelerate(block))(x), block(x))
    counts = []
    for net in (fast, model):
        with FlopCounterMode(display=False) as counter:
            net(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_network_around_an_accelerated_one():
    model = made()
    fast = senet.accelerate(nn.Sequential(senet.accelerate(model), nn.Sigmoid()).eval())
    with torch.no_grad():
        assert_same(fast(maps()), model(maps()).sigmoid())
    assert len(fast.acceleration.inference) == 2


def test_compiled_networks_see_what_is_loaded_and_learned():
    model = made()
    fast = senet.accelerate(model)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    other = {key: value * 1.5 for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert_same(compiled(maps()), model(maps()))
        fast.load_state_dict(other)
        model.load_state_dict(other)
        assert_same(compiled(maps()), model(maps()))
        for net in (compiled, model):
            net.train()
            for p in net.parameters():
                p.mul_(1.1)
            net.eval()
        assert_same(compiled(maps()), model(maps()))


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in super().__getstate__().items() if key != "lock"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.lock = threading.Lock()


def test_copies_and_pickles_go_the_networks_own_way():
    fast = senet.accelerate(Locked().eval())
    fast.compile(backend="eager")
    fast.first.requires_grad_(True)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            assert_same(twin(maps()), fast(maps()))
        assert twin.lock is not fast.lock
        assert all(p.requires_grad for p in twin.train().parameters())


def test_feature_extractors_of_torchvision():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small().eval()
    model = create_feature_extractor(network, {"features.4": "early", "features.8": "late"})
    fast = senet.accelerate(model)
    assert not fast.training
    assert len(fast.acceleration.inference) == 6
    x = maps(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for net in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            for key, value in net.eval()(x).items():
                assert_same(value / expected[key].abs().max(), expected[key] / expected[key].abs().max())


def test_replicas_for_other_devices_are_ordinary():
    assert type(senet.accelerate(made())._replicate_for_data_parallel()) is Net


def test_another_default_device_changes_nothing():
    model, x = timm.create_model("seresnet18").eval(), maps(1, 3, 32, 32)
    with torch.device("meta"):
        fast = senet.accelerate(model)
        assert len(fast.acceleration.inference) == 8
        with torch.no_grad():
            assert fast(x).device.type == "cpu"


def test_packed_weights_are_bounded_under_threads():
    conv = PackedConv2d(maps(4, 3, 1, 1), maps(4), [1, 1], [0, 0], [1, 1], 1, "none", [])

    def use(first):
        for size in range(first, first + 40):
            conv(maps(1, 3, size, 2))

    run_together(use, (1, 11, 21))
    assert len(conv.packed) <= conv.KEPT


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def replaced():
    model = made()
    model.first.conv.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branching, "cannot trace Branching"),  # in training mode
        (lambda: nn.DataParallel(made()), "DataParallel … model.module"),
        (lambda: torch.compile(made()), "compiled … ordinary"),
        (replaced, "forward of 'first.conv' … replaced"),
        (lambda: "resnet50", "network … got str"),
    ],
)
def test_networks_that_cannot_be_accelerated_are_refused_at_once(make, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.accelerate(make())
