"""Training through ``senet.accelerate``: against timm, against the ordinary network, and in PyTorch's own machinery."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import senet
from helpers.images import images, maps
from helpers.networks import randomized
from senet import SEConfig
from senet.ops.tail import native

NO_COMPILER = native.why_not() is not None
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
BEST = "reference" if NO_COMPILER else "native"
LABELS = torch.arange(6)


def small(**config):
    return senet.create_model("resnet8", num_classes=10, in_chans=1, se=SEConfig(reduction=4, **config))


def digits(dtype=torch.float64):
    return maps(6, 1, 16, 16, dtype=dtype)


def passes(model, x, y=LABELS):
    """Forward and backward pass: logits, every gradient by name, and all buffers."""
    out = model.train()(x)
    F.cross_entropy(out, y).backward()
    return {"out": out.detach()} | state_of(model)


def state_of(model):
    grads = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return copy.deepcopy(grads | dict(model.named_buffers()))


def assert_close(mine, right, tolerance):
    assert mine.keys() == right.keys()
    for name, expected in right.items():
        error = (mine[name].double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max().clamp_min(1e-6), f"{name}: {error:.2e}"


def backends(*others):
    """Each in turn, as ``use_backend`` names it; a network is captured once for all of them."""
    return ("reference", *others) if NO_COMPILER else ("native", "reference", *others)


@pytest.mark.parametrize("others", [(), pytest.param(("compiled",), marks=[pytest.mark.slow, needs_compiler])])
@pytest.mark.parametrize("layout", [pytest.param(torch.contiguous_format, marks=pytest.mark.slow), torch.channels_last])
def test_a_step_of_se_resnet50_is_timms(layout, others):
    theirs = randomized(timm.create_model("seresnet50", num_classes=10)).double().to(memory_format=layout)
    ours = senet.create_model("se_resnet50", num_classes=10).double().to(memory_format=layout)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fast, x, y = senet.accelerate(ours), images(64, 2).to(memory_format=layout), torch.tensor([3, 7])
    right = passes(theirs, x, y)
    for backend in backends(*others):
        fast.load_state_dict(ours.state_dict())
        fast.zero_grad()
        with senet.use_backend(backend):
            assert_close(passes(fast, x, y), right, 1e-8)
    assert len(fast.acceleration.training) == 49  # all norms, but for those of the projections, which are joined
    assert fast.acceleration.breaks == []
    assert fast.acceleration.graphs == {"training": 1}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet8", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_identity_gates_leave_the_plain_networks_output_bit_equal(training, name):
    networks = []
    for se in (None, SEConfig(identity_init=True)):
        torch.manual_seed(7)
        networks.append(senet.accelerate(senet.create_model(name, num_classes=4, se=se).train(training)))
    x = images(32, 2, dtype=torch.float32)
    for backend in ("auto", *backends()):
        with torch.set_grad_enabled(training), senet.use_backend(backend):
            plain, gated = (model(x) for model in networks)
        assert torch.equal(plain, gated), backend
    assert networks[1].acceleration.training if training else networks[1].acceleration.inference


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_runs_give_the_same_bits(layout):
    model, x = small().to(memory_format=layout), digits(torch.float32).to(memory_format=layout)
    with senet.use_backend("native"):
        runs = [passes(senet.accelerate(model), x) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


class Outer(nn.Module):
    """A network around an accelerated one."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x * self.scale) + self.scale


@pytest.mark.parametrize("whole", [torch.nn.Sequential, Outer])
def test_an_outer_compiler_runs_the_accelerated_form(whole):
    model, x = small().double(), digits()
    fast = senet.accelerate(model)
    compiled = torch.compile(whole(fast), backend="aot_eager")
    mine = passes(compiled, x)
    expected = passes(whole(model), x)
    assert_close({name.replace("_orig_mod.", ""): value for name, value in mine.items()}, expected, 1e-9)
    assert fast.acceleration.graphs == {"training": 1}  # captured by our backend, not by the outer compiler
    assert len(fast.acceleration.training) == 7
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), whole(model).eval()(x), rtol=1e-9, atol=1e-9)
    assert fast.acceleration.graphs == {"training": 1, "inference": 1}
    assert len(fast.acceleration.inference) == 3


def test_gradients_accumulate_and_updates_follow():
    """Two halves of a batch per step; the optimizer writes in place between the steps."""
    model, x = small().double(), digits()
    twins = model, senet.accelerate(model)
    optimizers = [torch.optim.AdamW(twin.parameters(), lr=1e-2) for twin in twins]
    for _ in range(2):
        for twin, optimizer in zip(twins, optimizers, strict=True):
            optimizer.zero_grad()
            for half, labels in zip(x.chunk(2), LABELS.chunk(2), strict=True):
                passes(twin, half, labels)
            optimizer.step()
    assert_close(state_of(twins[1]) | twins[1].state_dict(), state_of(model) | model.state_dict(), 1e-6)
    assert twins[1].acceleration.graphs == {"training": 1}


def test_averages_of_the_weights_stay_accelerated():
    """Exponential moving averages are deep copies, which are evaluated between the steps."""
    model, x = small().double(), digits()
    average_of = [torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)] * 2
    twins = model, senet.accelerate(model)
    averages = [
        torch.optim.swa_utils.AveragedModel(twin, multi_avg_fn=fn, use_buffers=True)
        for twin, fn in zip(twins, average_of, strict=True)
    ]
    optimizers = [torch.optim.SGD(twin.parameters(), lr=0.1) for twin in twins]
    for _ in range(3):
        outputs = []
        for twin, average, optimizer in zip(twins, averages, optimizers, strict=True):
            passes(twin, x)
            optimizer.step()
            average.update_parameters(twin)
            with torch.no_grad():
                outputs.append(average.eval()(x))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-7, atol=1e-7)
    assert len(averages[1].module.acceleration.inference) == 3
    assert len(twins[1].acceleration.training) == 7


def test_mixed_precision_with_a_gradient_scaler():
    """float32 weights under autocast to bfloat16: the loss of a few steps is that of the ordinary network."""
    model, x = small(), digits(torch.float32)
    curves = []
    for twin in (copy.deepcopy(model), senet.accelerate(model)):
        optimizer, scaler = torch.optim.SGD(twin.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses = []
        for _ in range(5):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = twin(x)
                loss = F.cross_entropy(out.float(), LABELS)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert out.dtype == torch.bfloat16
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.05
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert twin.acceleration.graphs == {"training": 1}
    assert len(twin.acceleration.training) > 0
