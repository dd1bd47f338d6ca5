"""The training pass on graphs that Dynamo captured: the same function and gradients, and what it must leave alone."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import senet
from senet.acceleration.checkpoints import run_checkpoints
from senet.acceleration.report import AS_CAPTURED
from senet.acceleration.sweep import APART, training_form
from senet.ops.tail import native
from senet.ops.tail.choice import Form
from senet.ops.tail.reasons import Reason
from senet.ops.tail.tail import tail

needs_native = pytest.mark.skipif(native.why_not() is not None, reason="no C++ compiler")
C = 16


class Sweeping:
    """A backend of torch.compile that applies the pass alone, and keeps what it made."""

    def __init__(self, backend="auto"):
        self.backend, self.graphs, self.decisions = backend, [], {}

    def __call__(self, module, inputs):
        run_checkpoints(module)
        work, decisions = training_form(module, self.backend)
        work.graph.lint()
        self.graphs += [part.graph for part in work.modules() if isinstance(part, torch.fx.GraphModule)]
        self.decisions |= {decision.site: decision for decision in decisions}
        return aot_eager(work, inputs) if self.backend == "traced" else work.forward

    @property
    def tails(self):
        return [node for graph in self.graphs for node in graph.nodes if node.target is tail]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def on(request):
    """A backend for tails of every size."""
    with senet.use_backend(request.param):
        yield request.param


def steps(model, x, count=2):
    """Logits, gradients of the last step, and all parameters and statistics after some steps of SGD."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = x.clone().requires_grad_()
    for _ in range(count):
        optimizer.zero_grad()
        out = model(x)
        out.square().mean().backward()
        optimizer.step()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def agree(mine, right, tolerance=1e-10):
    for a, b in zip(mine, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp_min(1e-6)


def compare(model, x, backend="auto", tolerance=1e-10, run=steps):
    """Run a network as it is and swept from the same start; returns the backend that swept it."""
    sweeping = Sweeping(backend)
    swept = torch.compile(copy.deepcopy(model), backend=sweeping)  # Module.compile skips containers in PyTorch 2.9
    with senet.use_backend("reference"):
        right = run(copy.deepcopy(model), x)
    agree(run(swept, x), right, tolerance)
    return sweeping


class Block(nn.Module):
    """A residual block as PyTorch's users write it; tests override ``end``."""

    def __init__(self, norm=nn.BatchNorm2d, gated=True):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = norm(C), norm(C)
        self.se = senet.SqueezeExcite(C, senet.SEConfig(reduction=2)) if gated else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def end(self, y, x):
        y = self.se(self.norm2(y))
        y += x
        return self.relu(y)

    def forward(self, x):
        return self.end(self.conv2(self.relu(self.norm1(self.conv1(x)))), x)


def double(*shape):
    return torch.randn(shape or (3, C, 6, 5), dtype=torch.float64)


def timm_network(name, **options):
    return timm.create_model(name, num_classes=5, **options)


NETWORKS = {
    "timm se": (lambda: timm_network("seresnet18"), 17, 8),
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=5), 17, 0),
    # The norm of a projection takes the sum where drop path stands between the branch and it.
    "timm drop": (lambda: timm_network("seresnet18", drop_path_rate=0.3, drop_rate=0.2), 20, 8),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "timm drop")) for n in NETWORKS])
def test_networks_train_as_they_are(name):
    make, tails, gates = NETWORKS[name]
    torch.manual_seed(0)
    with senet.use_backend("reference" if native.why_not() else "native"):
        sweeping = compare(make().double().train(), torch.randn(2, 3, 48, 48, dtype=torch.float64))
    assert len(sweeping.graphs) == 1
    assert len(sweeping.tails) == tails
    assert sum(node.args[2] is not None for node in sweeping.tails) == gates


NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(4, c)], ids=["batch", "group"])


@NORMS
@pytest.mark.parametrize("gated", [True, False])
def test_a_block_is_two_tails(on, norm, gated):
    sweeping = compare(nn.Sequential(Block(norm, gated), Block(norm, gated)).double(), double())
    assert len(sweeping.tails) == 4
    assert not any("relu" in str(node.target) for graph in sweeping.graphs for node in graph.nodes)


@NORMS
@pytest.mark.parametrize("gated", [True, False])
def test_for_a_compiler_norm_and_relu_stay_and_the_rest_is_traced(norm, gated):
    sweeping = compare(Block(norm, gated).double(), double(), "traced")
    assert len(sweeping.tails) == 1


class Late(Block):
    def end(self, y, x):
        y = self.norm2(y)
        return self.relu(self.se(y) + x) + y.mean()  # another reader of the norm


class Tapped(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        return self.end(self.relu(y + 0), x) + y


class Twice(Block):
    def forward(self, x):
        return self.relu(self.norm1(self.conv2(self.relu(self.norm1(self.conv1(x))))))


class Written(Block):
    def end(self, y, x):
        y = self.norm2(y)
        z = y.view(y.shape)
        z.mul_(2)  # through an alias
        return self.relu(y + x)


class Overwritten(Block):
    def end(self, y, x):
        total = x * 1
        view = total[:, :2]
        total += self.norm2(y)  # overwrites the shortcut, which is read again
        return self.relu(total) + view.mean()


class Broadcast(Block):
    def end(self, y, x):
        return self.relu(self.norm2(y) + x[:, :1])


class OtherType(Block):
    def end(self, y, x):
        return self.relu(self.norm2(y.float().double()) + x.float()) + self.norm1(y.float().double()).float()


class Both(Block):
    def end(self, y, x):
        y = self.norm2(y)
        return self.relu(y + y)


LEFT = {Late: 1, Tapped: 1, Twice: 0, Written: 1, Overwritten: 1, Broadcast: 1, Both: 1}


@pytest.mark.parametrize("block", LEFT, ids=lambda block: block.__name__)
def test_what_others_read_or_write_is_left(on, block):
    sweeping = compare(block(gated=False).double(), double())
    assert len(sweeping.tails) == LEFT[block]


class Guarded(Block):
    """Norms outside of the autocast region of their gate, and outside of the region without gradients."""

    def end(self, y, x):
        y = self.norm2(y)
        with torch.autocast("cpu", enabled=False):
            y = self.se(y)
        with torch.no_grad():
            x = self.relu(self.norm1(x))
        return self.relu(y + x)


def test_regions_stay_regions(on):
    assert len(compare(Guarded().double(), double()).tails) == 0


class Moved(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(C))

    def end(self, y, x):
        y = self.norm2(y)
        self.state.copy_(self.norm2.running_mean)  # what the norm has updated, before its sum
        self.state.mul_(x.detach().mean((0, 2, 3)))
        return self.relu(y + x)


def test_writes_between_keep_their_order(on):
    sweeping = compare(Moved().double(), double())
    assert len(sweeping.tails) == 1


@pytest.mark.parametrize("gated", [True, False])
def test_under_autocast_it_is_as_exact_as_the_network(on, gated):
    def gradients(model, x, half=True):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(x)
        assert out.dtype == (torch.bfloat16 if half else torch.float64)
        out.double().square().mean().backward()
        return [out.detach().double(), x.grad.double(), *(p.grad.double() for p in model.parameters())]

    torch.manual_seed(3)
    model, x, sweeping = nn.Sequential(Block(gated=gated), Block(gated=gated)), torch.randn(4, C, 12, 12), Sweeping()
    truth = gradients(copy.deepcopy(model).double(), x.double(), half=False)
    with senet.use_backend("reference"):
        plain = gradients(copy.deepcopy(model), x)
    model = torch.compile(model, backend=sweeping)
    swept = gradients(model, x)
    assert len(sweeping.tails) == 3 + gated  # the first shortcut has another dtype: a sum in place
    for mine, theirs, exact in zip(swept, plain, truth, strict=True):
        assert (mine - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-2 * exact.norm()


class Projected(Block):
    def __init__(self, gated=True):
        super().__init__(gated=gated)
        self.downsample = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.end(self.conv2(y), self.downsample(x))


@pytest.mark.parametrize("gated", [True, False])
def test_the_norm_of_a_projection_is_in_the_same_tail(on, gated):
    sweeping = compare(Projected(gated).double(), double())
    assert [node.args[6] is not None for node in sweeping.tails] == [False, True]


def test_frozen_norms_are_left_on_a_processor_unless_asked_for():
    model = Block().double()
    model.norm1.eval()
    model.norm2.eval()
    assert len(compare(model, double()).tails) == 0
    if native.why_not() is None:
        torch._dynamo.reset()
        assert len(compare(model, double(), "native").tails) == 2


@needs_native
def test_decisions_are_values(monkeypatch):
    monkeypatch.delenv("SENET_BACKEND", raising=False)
    model = nn.Sequential(Block(), Late())
    large = compare(model, torch.randn(4, C, 24, 24), tolerance=1e-3).decisions
    assert set(large) >= {"0.norm1", "0.se", "1.norm1"}
    assert (large["0.se"].form, large["0.se"].backend, large["0.se"].reason) == (Form.ONE_CALL, "native", None)
    assert (large["0.norm1"].form, large["0.norm1"].reason) == (Form.OPERATIONS, Reason.SIZE)
    assert (large["1.se"].form, large["1.se"].reason) == (AS_CAPTURED, APART)
    assert all(decision.mode == "training" for decision in large.values())


def test_other_sizes_are_captured_and_swept(on):
    def run(model, sizes):
        return [value for size in sizes for value in steps(model, double(size, C, 2 + size, 5), 1)]

    torch.manual_seed(2)
    model, sweeping, results = nn.Sequential(Block(), Projected()).double(), Sweeping(), []
    for swept in (True, False):
        own = copy.deepcopy(model)
        if swept:
            own = torch.compile(own, backend=sweeping)
        torch.manual_seed(4)
        results.append(run(own, (3, 4, 5, 6)))
    agree(*results)
    assert len(sweeping.graphs) == 2  # as captured first, then for any size
    assert len(sweeping.tails) == 8


class PreActivation(Block):
    def forward(self, x):
        y = self.conv1(self.relu(self.norm1(x)))
        return x + self.se(self.conv2(torch.relu(self.norm2(y))))


def test_the_gate_and_sum_of_a_pre_activation_block_are_a_tail(on):
    torch.manual_seed(0)
    sweeping = compare(nn.Sequential(PreActivation(), PreActivation()).double(), double())
    assert [node.args[1] is None for node in sweeping.tails] == [False, False, True] * 2


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.second(checkpoint(self.first, x.sin(), use_reentrant=False))


def test_checkpointed_parts_are_swept(on):
    def run(model, x):
        torch.manual_seed(1)
        x = x.clone().requires_grad_()
        model(x).square().mean().backward()
        return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    sweeping = compare(Checkpointed().double(), double(), run=run)
    assert len(sweeping.tails) == 4
    assert set(sweeping.decisions) == {"first.norm1", "first.se", "second.norm1", "second.se"}


def test_our_own_networks_train_as_they_are(on):
    torch.manual_seed(0)
    compare(senet.create_model("se_resnet8", 5).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64))
