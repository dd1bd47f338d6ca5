"""What changes between calls of an accelerated network, other than weights, takes effect at the next call."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import senet
from helpers.accelerated import (
    Block,
    Body,
    Gate,
    assert_close,
    assert_same_gradients,
    assert_same_in_eval,
    captures,
    image,
    outputs,
    step,
)
from helpers.networks import all_names

MODULE = SimpleNamespace(factor=1.0)


class Adjustable(Body):
    """A network whose forward reads values of many kinds."""

    def __init__(self):
        super().__init__()
        self.second = Block()
        self.factors, self.options, self.nested = [1.0], {"bias": 0.0}, SimpleNamespace(power=1)
        self.function, self.slope = F.relu, nn.LeakyReLU(0.1)

    def forward(self, x):
        x = self.slope(self.function(self.second(self.block(self.stem(x)))))
        y = x.mean((2, 3)) * self.factors[0] + self.options["bias"]
        return (y**self.nested.power) * MODULE.factor


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def set_eps(net):
    for norm in norms(net):
        norm.eps = 0.5


def set_padding(net):
    net.stem.padding = (2, 2)


def set_stride(net):
    net.stem.stride = (2, 2)


def set_list(net):
    net.factors[0] = 3.0


def set_key(net):
    net.options["bias"] = 1.0


def set_inside(net):
    net.nested.power = 2


def set_function(net):
    net.function = torch.sigmoid


def set_slope(net):
    net.slope.negative_slope = 0.9
    net.function = functools.partial(torch.add, other=-1.0)


def set_no_statistics(net):
    for norm in norms(net):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def set_forward(net):
    net.block.se.forward = functools.partial(torch.mul, other=0.5)


def set_gate_function(net):
    net.block.se.sigma = nn.Tanh()


def set_gate(net):
    net.block.se = nn.Identity()


def set_larger_gate(net):
    torch.manual_seed(7)
    net.block.se = Gate(16, hidden=9)


def set_mode_of_norm(net):
    net.block.norm.train()


def swap_blocks(net):
    net.block, net.second = net.second, net.block


CHANGES = [
    *(
        set_eps,
        pytest.param(set_padding, marks=pytest.mark.slow, id="set_padding"),
        set_stride,
        set_list,
        set_key,
        pytest.param(set_inside, marks=pytest.mark.slow, id="set_inside"),
        pytest.param(set_function, marks=pytest.mark.slow, id="set_function"),
        set_slope,
        set_no_statistics,
    ),
    *(
        pytest.param(set_forward, marks=pytest.mark.slow, id="set_forward"),
        set_gate_function,
        set_gate,
        pytest.param(set_larger_gate, marks=pytest.mark.slow, id="set_larger_gate"),
        set_mode_of_norm,
        pytest.param(swap_blocks, marks=pytest.mark.slow, id="swap_blocks"),
    ),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_eval_mode(change):
    torch.manual_seed(0)
    model = Adjustable().eval()
    fast = senet.accelerate(model)
    (before,) = outputs(fast, image())
    change(model)
    change(fast)
    expected = outputs(model, image())
    assert before.shape != expected[0].shape or (before - expected[0]).abs().max() > 1e-3 * before.abs().max()
    for _ in range(2):
        assert_close(outputs(fast, image()), expected)


@pytest.mark.parametrize("change", [set_eps, set_list, set_gate])
def test_a_change_between_training_steps(change):
    torch.manual_seed(0)
    model = Adjustable().double()
    fast = senet.accelerate(model.train())
    for net in (fast, model):
        step(net, image().double())
        change(net)
    (mine, gradients, _), (expected, wanted, _) = step(fast, image().double()), step(model, image().double())
    assert_close(mine, expected)
    assert_same_gradients(gradients, wanted, 1e-8)


def test_a_number_of_the_module_that_the_network_stands_in(monkeypatch):
    torch.manual_seed(0)
    model = Adjustable().eval()
    fast = senet.accelerate(model)
    for factor in (1.0, 2.0, -1.0):
        monkeypatch.setattr(MODULE, "factor", factor)
        assert_close(outputs(fast, image()), outputs(model, image()))


def test_momentum_of_a_norm():
    torch.manual_seed(0)
    model = Body().double().train()
    fast = senet.accelerate(model)
    for momentum in (0.1, 0.9, None):
        for net in (fast, model):
            net.block.norm.momentum = momentum
        (_, _, mine), (_, _, expected) = step(fast, image().double()), step(model, image().double())
        assert_close(mine, expected)


def doubled(module, args, output):
    return 2 * output


def halved_input(module, args):
    return (0.5 * args[0],)


PLACES = ["", "stem", "block", "block.norm", "block.se", "block.se.reduce", "block.se.expand", "block.se.sigma"]
SOME_PLACES = all_names({"block.norm", "block.se", "block.se.expand"}, PLACES)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("place", SOME_PLACES)
def test_hooks_are_heard_wherever_they_are_and_whenever_they_come(place, train):
    torch.manual_seed(0)
    model = Body().double().train(train)
    fast, x = senet.accelerate(model), image().double()
    assert_close(outputs(fast, x), outputs(model, x))
    handles = []
    for register, hook in (("register_forward_hook", doubled), ("register_forward_pre_hook", halved_input)):
        handles = [getattr(net.get_submodule(place), register)(hook) for net in (model, fast)]
        assert_close(outputs(fast, x), outputs(model, x))
        for handle in handles:
            handle.remove()
        assert_close(outputs(fast, x), outputs(model, x))


@pytest.mark.parametrize("place", SOME_PLACES[1:])
def test_hooks_that_were_there_before_are_heard(place):
    model = Body()
    model.get_submodule(place).register_forward_hook(doubled)
    assert_same_in_eval(model, image())


def test_new_sizes_of_images_are_captured_a_few_times_only():
    torch.manual_seed(0)
    model = Body().eval()
    fast = senet.accelerate(model)
    before = captures()
    for batch, height, width in ((2, 9, 9), (2, 12, 9), (3, 17, 20), (5, 8, 31), (7, 33, 16), (4, 24, 24), (6, 5, 5)):
        x = image(batch, 3, height, width)
        assert_close(outputs(fast, x), outputs(model, x))
    assert captures() - before <= 4


def test_both_modes_are_captured_once():
    fast = senet.accelerate(Body().double())
    for _ in range(2):
        step(fast.train(), image().double())
        outputs(fast.eval(), image().double())
        step(fast, image().double())  # gradients in eval mode
    before = captures()
    for _ in range(3):
        step(fast.train(), image().double())
        outputs(fast.eval(), image().double())
        step(fast, image().double())
    assert captures() == before


def test_many_copies_of_one_network_stay_accelerated():
    """PyTorch keeps a bounded number of captures for a function; copies of one class share its functions."""
    torch.manual_seed(0)
    models = [Body().eval() for _ in range(12)]
    fast = [senet.accelerate(model) for model in models]
    for _ in range(2):
        for mine, model in zip(fast, models, strict=True):
            assert_close(outputs(mine, image()), outputs(model, image()))
    assert all(list(mine.acceleration.inference) == ["block.se"] for mine in fast)
