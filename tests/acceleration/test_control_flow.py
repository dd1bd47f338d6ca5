"""Branches, random draws, counters, and regions in a forward: what a single trace would take for constant."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import senet
from helpers.accelerated import (
    Block,
    Body,
    assert_close,
    assert_same,
    assert_same_in_eval,
    assert_same_in_training,
    captures,
    image,
    in_sweeps,
    outputs,
    seeded,
)


class OfTensors(Body):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x / x.std()
        return self.body(x)


class OfSizes(Body):
    def forward(self, x):
        return self.body(x) if x.shape[0] > 1 else 2 * self.body(x.flip(3))


class OfNumbers(Body):
    """Which branch is taken is known from the tensor's numbers only."""

    def forward(self, x):
        y = self.body(x)
        return y if y.sum() > 0 else 3 * y


class OfCaught(Body):
    def forward(self, x):
        try:
            x = x + self.offset
        except AttributeError:
            x = x - 0.5
        return self.body(x)


@pytest.mark.parametrize("network", [OfTensors, OfSizes, OfCaught], ids=lambda network: network.__name__)
def test_a_branch_on_what_the_input_is(network):
    assert_same(network, image())


def test_a_branch_on_the_size_of_the_batch_is_taken_anew():
    model = OfSizes().eval()
    fast = senet.accelerate(model)
    for batch in (2, 1, 3, 1):
        assert_close(outputs(fast, image(batch, 3, 9, 9)), outputs(model, image(batch, 3, 9, 9)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_branch_on_numbers_is_taken_anew(train):
    model = OfNumbers().double()
    nn.init.constant_(model.block.conv.bias, -1.0)
    model.train(train)
    fast = senet.accelerate(model)
    for sign in (1, -1, 1):
        x = sign * image().double()
        assert_close(outputs(fast, x), outputs(model, x))
    (assert_same_in_training if train else assert_same_in_eval)(model, image().double(), dtype=torch.float64)


class OfTypes(Body):
    def forward(self, x):
        return self.body(x) * (2 if x.dtype is torch.float32 else 1)


def test_a_branch_on_the_type_of_numbers():
    assert_same(OfTypes, image())
    model = OfTypes().eval()
    fast = senet.accelerate(model)
    assert_close(outputs(fast, image()), outputs(model, image()))
    assert_close(outputs(fast.double(), image().double()), outputs(model.double(), image().double()))


class OfGradients(Body):
    """Cheaper where nobody differentiates it, as some detectors and diffusion networks do."""

    def forward(self, x):
        return self.body(x) if torch.is_grad_enabled() else self.body(x).round(decimals=1)


def test_a_branch_on_the_gradient_mode():
    model = OfGradients().eval()
    fast = senet.accelerate(model)
    for _ in range(2):
        assert_close(fast(image()), model(image()))
        assert_close(outputs(fast, image()), outputs(model, image()))
        with torch.inference_mode():
            assert_close(fast(image()), model(image()))


class OfLists(Body):
    def forward(self, x):
        return torch.cat([self.body(part) for part in x]) if isinstance(x, list) else self.body(x)


def test_a_list_where_a_tensor_was_before():
    model = OfLists().eval()
    fast = senet.accelerate(model)
    for x in (image(), [image(), image(seed=1)], [image(1, 3, 9, 9)], image()):
        assert_close(outputs(fast, x), outputs(model, x))
    assert_same_in_training(OfLists(), [image().double(), image(seed=1).double()])


class ByNumpy(Body):
    def forward(self, x):
        return self.body(x) if np.random.rand() < 0.5 else self.body(2 * x)


class ByPython(Body):
    def forward(self, x):
        return self.body(random.choice((1.0, 2.0, 3.0)) * x)


class ByTorch(Body):
    """Stochastic depth, drawn once for the batch."""

    def forward(self, x):
        return self.body(x) if torch.rand(()) < 0.5 else self.stem(x).mean((2, 3))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "network",
    [ByNumpy, pytest.param(ByPython, marks=pytest.mark.slow, id="ByPython"), ByTorch],
    ids=lambda network: network.__name__,
)
def test_each_call_draws_anew_and_the_same_numbers(network, train):
    model = network().train(train)
    fast = senet.accelerate(model)
    with torch.no_grad():
        different = []
        for net in (model, fast):
            seeded()
            different.append([round(float(net(image()).sum()), 2) for _ in range(12)])
    assert len(set(different[0])) > 1
    assert different[0] == pytest.approx(different[1], rel=1e-3)


class Dropping(Body):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.body(x))


def test_dropout_draws_the_same_numbers():
    assert_same(Dropping, image(), calls=3)


class Counted(Body):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls


class CountedInABuffer(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls.clone()  # which the next call writes before a backward pass


class Remembered(Body):
    """The output is a moving average over calls."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = self.body(x)
        self.last = y.detach() if self.last is None else 0.5 * self.last + 0.5 * y.detach()
        return y + self.last


class InAList(Body):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[0])
        return self.body(x) * len(self.seen)


COUNTED = [
    Counted,
    CountedInABuffer,
    pytest.param(Remembered, marks=pytest.mark.slow, id="Remembered"),
    pytest.param(InAList, marks=pytest.mark.slow, id="InAList"),
]


@pytest.mark.parametrize("network", COUNTED, ids=lambda network: network.__name__)
def test_what_a_call_leaves_for_the_next_one(network):
    assert_same(network, image(), calls=3)


def test_accelerating_is_no_call():
    model = CountedInABuffer().eval()
    fast = senet.accelerate(model)
    assert (float(fast.calls), float(model.calls)) == (0, 0)
    with_input = senet.accelerate(model, example_input=image())
    assert (float(with_input.calls), float(model.calls)) == (0, 0)
    before = {key: value.clone() for key, value in Body().train().state_dict().items()}
    body = Body().train()
    body.load_state_dict(before)
    fast = senet.accelerate(body, example_input=image())
    assert all(torch.equal(value, before[key]) for key, value in fast.state_dict().items())
    assert all(p.grad is None for p in fast.parameters())


@pytest.mark.parametrize("network", [CountedInABuffer, Remembered], ids=lambda network: network.__name__)
def test_a_network_that_writes_its_state_is_not_captured_at_each_call(network):
    fast = senet.accelerate(network().eval())
    outputs(fast, image(), calls=3)
    before = captures()
    outputs(fast, image(), calls=5)
    assert captures() == before


class Frozen(Body):
    """The lower part is computed without gradients."""

    def __init__(self):
        super().__init__()
        self.head = Block()

    def forward(self, x):
        with torch.no_grad():
            x = self.block(self.stem(x))
        return self.head(x)


class Detached(Frozen):
    def forward(self, x):
        return self.head(self.block(self.stem(x)).detach())


class Switched(Frozen):
    @torch.no_grad()
    def features(self, x):
        return self.block(self.stem(x))

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize(
    "network",
    [Frozen, Detached, pytest.param(Switched, marks=pytest.mark.slow, id="Switched")],
    ids=lambda network: network.__name__,
)
def test_parts_without_gradients(network):
    fast = assert_same_in_training(network(), image().double())
    assert {name.split(".")[0] for name, p in fast.named_parameters() if p.grad is not None} == {"head"}
    assert_same_in_eval(network(), image())


class Island(Body):
    """Under autocast, the block runs in float32 all the same."""

    def forward(self, x):
        x = self.stem(x)
        with torch.autocast("cpu", enabled=False):
            x = self.block(x.float())
        return x.mean((2, 3))


class AutocastInside(Body):
    def forward(self, x):
        x = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.block(x)
        return x.float().mean((2, 3))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("network", [Island, AutocastInside, Body], ids=lambda network: network.__name__)
def test_autocast_regions(network, around):
    model = network().eval()
    fast = senet.accelerate(model)
    single = outputs(model, image())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        mine, expected = outputs(fast, image()), outputs(model, image())
    assert [t.dtype for t in mine] == [t.dtype for t in expected]
    # As far from float32 as the ordinary network is, or rounding of float32.
    error = max(float((a - b).abs().max()) for a, b in zip(expected, single, strict=True)) if around else 0.0
    scale = float(single[0].abs().max())
    inside = 2**-6 if network is AutocastInside else 2e-5
    assert float((mine[0] - single[0]).abs().max()) <= max(2 * error, inside * scale)


class Checkpointed(Body):
    """Maps of the block are computed again in the backward pass."""

    reentrant = False

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant).mean((2, 3))


class CheckpointedAsBefore(Checkpointed):
    reentrant = True


class CheckpointedTwice(Checkpointed):
    def __init__(self):
        super().__init__()
        self.head = Block()

    def forward(self, x):
        x = checkpoint(self.block, self.stem(x), use_reentrant=False)
        return checkpoint(self.head, x, use_reentrant=False).mean((2, 3))


def bytes_kept(net, x):
    """What the forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(x).sum()
    loss.backward()
    return sum(kept.values())


CHECKPOINTED = [
    Checkpointed,
    CheckpointedAsBefore,
    pytest.param(CheckpointedTwice, marks=pytest.mark.slow, id="CheckpointedTwice"),
]


@pytest.mark.filterwarnings("ignore:.*none of the inputs have requires_grad")
@pytest.mark.parametrize("network", CHECKPOINTED, ids=lambda network: network.__name__)
def test_checkpointed_parts(network):
    assert_same(network, image())
    fast, model, x = senet.accelerate(network().train()), network().train(), image(4, 3, 32, 32)
    ordinary = bytes_kept(Body().train(), x)
    with in_sweeps():
        mine = bytes_kept(fast, x)
    assert mine <= 1.1 * bytes_kept(model, x) < ordinary
    outputs(fast.eval(), x)
    assert "block.se" in fast.acceleration.inference
