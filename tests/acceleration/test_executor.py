"""Inference graphs whose convolutions run in one call: the same bits as one by one, and nobody's map is overwritten."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import senet
from helpers.acceleration import instances
from helpers.networks import all_names
from helpers.threads import run_together
from senet.acceleration import executor as planned
from senet.acceleration.executor import Planned
from senet.ops.conv import native as convolutions
from senet.ops.conv.native import OwnConv2d
from senet.ops.conv.program import Run, Step
from senet.ops.csrc import build, calls
from senet.ops.reference import FullyConnected

ORDINARY = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
pytestmark = pytest.mark.skipif(
    build.compiler() is None or calls.constant("panel") < 16, reason="no convolutions of our own"
)


def images(seed, n=2, size=64, c=3):
    x = torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def accelerated(name, **options):
    torch.manual_seed(0)
    return senet.accelerate(senet.create_model(name, **options).eval())


@pytest.fixture
def graphs(monkeypatch):
    """The planned graphs that are made, in order: of a capture, that of the whole network comes first."""
    return instances(monkeypatch, Planned)


def called(fast, x):
    with torch.no_grad():
        return fast(x)


def runs_of(program):
    return [module for module in program.modules() if isinstance(module, Run)]


@pytest.mark.parametrize(
    "name", all_names({"se_resnet50"}, ["se_resnet50", "resnet50", "se_resnext50_32x4d", "vgg16_bn", "se_preresnet164"])
)
def test_a_plan_computes_the_same_bits_as_its_steps(name, graphs):
    options = {"num_classes": 0} if "vgg" in name else {}  # nine in ten of VGG's weights are its classifier's
    fast, x = accelerated(name, **options), images(1, size=64 if "164" not in name else 32)
    called(fast, x)
    whole = graphs[0]
    with torch.no_grad():
        for seed in (1, 2):
            x = images(seed, size=x.shape[2])
            (one_by_one,) = whole.ordinary(x)
            for _ in range(2):
                assert torch.equal(fast(x), one_by_one)
    (program,) = whole.plans.values()
    assert runs_of(program)


def test_se_resnet50_is_a_single_run_behind_its_stem(monkeypatch):
    made = []

    class Noted(Run):
        def __init__(self, steps, *maps):
            super().__init__(steps, *maps)
            made.append((self, steps))

    monkeypatch.setattr(planned, "Run", Noted)
    called(accelerated("se_resnet50"), images(1))
    ((run, steps),) = made
    assert len(steps) == 52  # all convolutions but the stem's
    assert sum(step.gated for step in steps) == 16
    maps = sum(4 * step.shape.numel() for step in steps)
    assert 0 < run.workspace < maps / 5


def test_what_was_returned_stays_as_it_was(graphs):
    fast = accelerated("se_resnet50", features_only=True)
    x, other = images(1), images(2)
    called(fast, x)
    with torch.no_grad():
        returned = fast(x)
        copies = [feature.clone() for feature in returned]
        fast(other)
        assert all(torch.equal(a, b) for a, b in zip(returned, copies, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(fast(x), copies, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(graphs[0].ordinary(x), copies, strict=True))


def test_an_image_is_not_written_to():
    fast = senet.accelerate(nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()).eval())
    x = images(1, c=16)
    before = x.clone()
    for _ in range(2):
        called(fast, x)
    assert torch.equal(x, before)


def test_no_images():
    fast = accelerated("se_resnet50")
    for _ in range(2):
        assert called(fast, images(1, n=0)).shape == (0, 1000)


@pytest.mark.slow
def test_threads_have_workspaces_of_their_own():
    fast = accelerated("se_resnet50")
    inputs = [images(seed, n=1, size=48) for seed in range(4)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]

    def work(index):
        with torch.no_grad():
            assert all(torch.equal(fast(inputs[index]), expected[index]) for _ in range(20))

    run_together(work, range(4))


@pytest.mark.slow
def test_few_shapes_are_kept_and_large_workspaces_are_not(monkeypatch, graphs):
    fast = accelerated("se_resnet50")
    for size in range(32, 32 + 4 * (Planned.KEPT + 3), 4):
        called(fast, images(1, n=1, size=size))
    assert all(len(graph.plans) <= Planned.KEPT for graph in graphs)
    assert sum(len(graph.plans) for graph in graphs) > 1
    monkeypatch.setattr(planned, "WORKSPACE", 1000)
    fast, before = accelerated("se_resnet50"), len(graphs)
    x = images(1)
    first = called(fast, x)
    assert torch.equal(called(fast, x), first)
    whole = graphs[before]
    assert list(whole.plans.values()) == [whole.ordinary]


@pytest.mark.slow
def test_another_number_of_threads_gets_another_plan(graphs):
    fast, x = accelerated("se_resnet50"), images(1)
    before = torch.get_num_threads()
    try:
        outputs = []
        for number in (1, 3, 1):
            torch.set_num_threads(number)
            outputs.append(called(fast, x))
    finally:
        torch.set_num_threads(before)
    assert sum(len(graph.plans) for graph in graphs) >= 2
    # PyTorch's own pooling and stem may share their work differently
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()


def convolution(seed, kernel):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 32, kernel, kernel, generator=generator) / (6 * kernel)
    conv = OwnConv2d(weight, torch.randn(32, generator=generator), 1, kernel // 2, 1, *convolutions.UNBOUNDED)
    if kernel == 1:
        w1, w2 = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
        conv.take_gate(FullyConnected(w1, None, w2, None, "sigmoid"))
    return conv


CONVOLUTIONS = {kernel: convolution(kernel, kernel) for kernel in (1, 3)} if build.compiler() else {}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_graph_of_convolutions_on_planned_memory(data):
    """Random graphs with shortcuts, in place where nobody reads them afterwards, and any maps wanted."""
    count = data.draw(st.integers(2, 9))
    shape, inputs = torch.Size((2, 32, 4, 3)), ["a", "b"]
    chosen, keys = [], list(inputs)
    for index in range(count):
        kernel = data.draw(st.sampled_from((1, 3)))
        x = data.draw(st.sampled_from(keys))
        shortcut = data.draw(st.sampled_from([None, *keys]))
        chosen.append((kernel, x, shortcut, index))
        keys.append(index)
    wanted = data.draw(st.lists(st.sampled_from(range(count)), min_size=1, max_size=3, unique=True))
    steps = []
    for kernel, x, shortcut, index in chosen:
        later = {key for _, *sources, other in chosen if other > index for key in sources}
        free = shortcut is not None and shortcut != x and shortcut not in later and shortcut not in wanted
        overwrites = free and data.draw(st.booleans())
        gated = kernel == 1 and data.draw(st.booleans())
        step = Step(CONVOLUTIONS[kernel], x, shortcut, index, shape, True, gated, overwrites)
        steps.append(step)
    read = [key for key in inputs if any(key in (step.x, step.shortcut) for step in steps)]
    run = Run(steps, dict.fromkeys(read, shape), wanted)
    generator = torch.Generator().manual_seed(7)
    maps = [torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in read]
    expected = run.one_by_one(*(x.clone(memory_format=torch.channels_last) for x in maps))
    got = run(*(x.clone(memory_format=torch.channels_last) for x in maps))
    pairs = zip(*((result,) if len(wanted) == 1 else result for result in (got, expected)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_maps_of_another_size_go_one_by_one():
    shape = torch.Size((1, 32, 6, 6))
    steps = [
        Step(CONVOLUTIONS[3], "x", None, "y", shape, True, False, False),
        Step(CONVOLUTIONS[1], "y", "x", "z", shape, True, True, False),
    ]
    run = Run(steps, {"x": shape}, ["z"])
    x = images(1, n=3, size=9, c=32)
    assert run(x).shape == (3, 32, 9, 9)
    assert torch.equal(run(x), run.one_by_one(x))
    assert torch.equal(run(x[:1, :, :6, :6]), run.one_by_one(x[:1, :, :6, :6]))
