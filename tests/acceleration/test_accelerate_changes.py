"""What happens to an accelerated network afterwards, and calls that are out of the ordinary."""

import copy
import functools
import pickle
import threading
import types

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import senet
from helpers.acceleration import report_of
from helpers.images import maps
from helpers.messages import one_line
from helpers.threads import run_together
from senet.acceleration.fold import EARLY
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


def test_a_head_inside_a_head_is_replaced():
    fast = senet.accelerate(timm.create_model("regnety_002", num_classes=5).eval())
    with torch.no_grad():
        assert fast(maps(1, 3, 32, 32)).shape == (1, 5)
        fast.reset_classifier(2)  # sets an attribute of model.head
        assert fast(maps(1, 3, 32, 32)).shape == (1, 2)


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


def test_what_is_drawn_in_eval_mode_is_drawn_as_in_the_ordinary_network():
    """Also where the batch is large enough to be run in parts."""
    model = made()
    model.second.drop.train()
    # Random numbers are drawn in the order of the memory: in channels_last, as the fast form returns its maps.
    fast, x = senet.accelerate(model), maps(4, 3, 160, 160).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for net in (fast, fast):
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            assert_same(net(x), expected)


def test_accelerating_leaves_no_mark_on_maps_and_random_numbers():
    model = made().train()
    state = torch.get_rng_state()
    fast = senet.accelerate(model)
    assert fast.first.last is None
    assert torch.equal(state, torch.get_rng_state())
    pickle.dumps(fast.eval())
    with torch.no_grad():
        fast(maps())
        assert type(fast.first.last) is torch.Tensor  # what the forward keeps is real
        model.eval()(maps())
    assert_same(fast.first.last, model.first.last)
    state = torch.get_rng_state()
    with torch.no_grad():
        fast(maps())
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_by_name_and_optional_ones():
    model = made()
    fast = senet.accelerate(model)
    mask = maps(2, 1, 6, 5, seed=1)
    with torch.no_grad():
        assert_same(fast(x=maps()), model(maps()))
        assert_same(fast(maps(), mask), model(maps(), mask))
        assert_same(fast(maps(), mask=mask), model(maps(), mask))
        assert_same(fast(mask=mask, x=maps()), model(maps(), mask))
    with pytest.raises(TypeError, match="'x'"):
        fast()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.se, self.bn = senet.SqueezeExcite(8), nn.BatchNorm2d(8)

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


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch.func
@pytest.mark.parametrize("called", [False, True])
def test_what_looks_at_operations_finds_them(called):
    model = made()
    fast, x = senet.accelerate(model), maps()
    block = senet.accelerate(made().first)
    if called:
        fast(x)
        block(x)
    assert_same(torch.func.vmap(fast)(x[:, None]), torch.func.vmap(model)(x[:, None]))
    assert_same(torch.fx.symbolic_trace(block)(x), made().first(x))
    counts = []
    for net in (fast, model):
        with FlopCounterMode(display=False) as counter:
            net(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    _, tangent = torch.func.jvp(fast, (x,), (torch.ones_like(x),))
    assert_same(tangent, torch.func.jvp(model, (x,), (torch.ones_like(x),))[1])
    program = torch.export.export(fast, (x,))
    assert_same(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore")  # torch.jit is on its way out
def test_torch_jit_trace_records_the_ordinary_network():
    model = made()
    fast, x = senet.accelerate(model), maps()
    assert_same(torch.jit.trace(fast, x)(x), model(x))


def test_a_network_around_an_accelerated_one():
    model = made()
    fast = senet.accelerate(nn.Sequential(senet.accelerate(model), nn.Sigmoid()).eval())
    with torch.no_grad():
        assert_same(fast(maps()), model(maps()).sigmoid())
    assert list(fast[0].acceleration.inference) == ["first.se", "second.se"]


def test_compiled_networks_see_what_is_loaded_and_learned():
    model = made()
    fast = senet.accelerate(model)
    compiled = torch.compile(fast, backend="eager")
    other = {key: value * 1.5 for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert_same(compiled(maps()), model(maps()))
        fast.load_state_dict(other)
        model.load_state_dict(other)
        assert_same(compiled(maps()), model(maps()))
        for net in (compiled, model):
            for p in net.parameters():
                p.mul_(1.1)
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


@pytest.mark.parametrize("called", [False, True])
def test_copies_and_pickles_go_the_networks_own_way(called):
    fast = senet.accelerate(Locked().eval())
    fast.first.requires_grad_(False)
    if called:
        with torch.no_grad():
            fast(maps())
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.lock is not fast.lock
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in fast.parameters()]
        with torch.no_grad():
            assert_same(twin(maps()), fast(maps()))
            twin.second.conv.weight.zero_()
            assert (twin(maps()) - fast(maps())).abs().max() > 1e-4
        assert set(twin.acceleration.inference) == {"first.se", "second.se"}


def test_feature_extractors_of_torchvision():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small().eval()
    model = create_feature_extractor(network, {"features.4": "early", "features.8": "late"})
    fast = senet.accelerate(model)
    assert not fast.training
    x = maps(1, 3, 64, 64)
    assert len(report_of(fast, x).inference) == 6
    with torch.no_grad():
        expected = model(x)
        for net in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            for key, value in net.eval()(x).items():
                assert_same(value / expected[key].abs().max(), expected[key] / expected[key].abs().max())


@pytest.mark.parametrize("called", [False, True])
def test_replicas_for_other_devices_use_their_own_weights(called):
    model = made()
    fast = senet.accelerate(model)
    if called:
        fast(maps())
    replica = fast._replicate_for_data_parallel()
    assert type(replica) is Net
    replica.first = model.first
    replica.second = nn.Identity()
    with torch.no_grad():
        assert_same(replica(maps()), model.first(maps()))
        assert_same(fast(maps()), model(maps()))


def test_another_default_device_changes_nothing():
    model, x = timm.create_model("seresnet18").eval(), maps(1, 3, 32, 32)
    with torch.device("meta"):
        fast = senet.accelerate(model)
        with torch.no_grad():
            assert fast(x).device.type == "cpu"
    assert_same(fast(x), model(x))


def test_threads_call_one_network_from_its_first_call_on():
    torch.manual_seed(0)
    fast, model = senet.accelerate(made()), made()
    inputs = [maps(2, 3, 6, 5, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def work(index):
        with torch.no_grad():
            for _ in range(5):
                assert_same(fast(inputs[index]), expected[index])

    run_together(work, range(4))
    assert fast.acceleration.ordinary is None


def test_packed_weights_are_bounded_under_threads():
    conv = PackedConv2d(maps(4, 3, 1, 1), maps(4), [1, 1], [0, 0], [1, 1], 1, "none", [])

    def use(first):
        for size in range(first, first + 40):
            conv(maps(1, 3, size, 2))

    run_together(use, (1, 11, 21))
    assert len(conv.packed) <= conv.KEPT


def doubled_forward(self, x, mask=None):
    return 2 * type(self).forward(self, x, mask)


def by_method(model):
    model.forward = types.MethodType(doubled_forward, model)


def by_partial(model):
    model.forward = functools.partial(doubled_forward, model)


@pytest.mark.parametrize("change", [by_method, by_partial], ids=lambda change: change.__name__)
def test_a_forward_that_was_replaced_on_the_network_itself(change):
    model, plain = made(), made()
    change(model)
    with torch.no_grad():
        expected = 2 * plain(maps())
        fast = senet.accelerate(model)
        for net in (fast, copy.deepcopy(fast), fast):
            assert_same(net(maps()), expected)
        fast.second.se = nn.Identity()
        model.second.se = nn.Identity()
        assert_same(fast(maps()), model(maps()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(made()), "DataParallel … model.module"),
        (lambda: torch.compile(made()), "compiled … ordinary"),
        (lambda: "resnet50", "network … got str"),
    ],
)
def test_networks_that_cannot_be_accelerated_are_refused_at_once(make, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.accelerate(make())
