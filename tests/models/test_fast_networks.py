"""Whole networks on the fast tails: against timm, against plain PyTorch, and inside PyTorch's own machinery."""

import copy
import json

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import senet
from senet import SEConfig, SqueezeExcite
from senet.ops.tail import native

NO_COMPILER = native.why_not() is not None
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
# torch 2.9's own Dynamo looks at gradients of what is no leaf
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def step(model, x, y):
    """Logits, every gradient by name, and the statistics after one training step's passes."""
    model.train()
    out = model(x)
    F.cross_entropy(out, y).backward()
    grads = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return {"out": out.detach()} | grads | dict(model.named_buffers())


def assert_close(mine, right, tolerance):
    assert mine.keys() == right.keys()
    for name, expected in right.items():
        error = (mine[name].double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max().clamp_min(1e-6), f"{name}: {error:.2e}"


@pytest.mark.parametrize("backend", [NATIVE, pytest.param("reference", marks=pytest.mark.slow), COMPILED])
@LAYOUTS
def test_a_step_of_se_resnet50_is_timms(backend, layout):
    theirs = timm.create_model("seresnet50", num_classes=10).double().to(memory_format=layout)
    ours = senet.create_model("se_resnet50", num_classes=10).double().to(memory_format=layout)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (theirs, ours):  # timm starts the branches at zero: no gradient would reach them
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 0.6)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=layout)
    y = torch.tensor([3, 7])
    with senet.use_backend(backend):
        mine = step(ours, x, y)
    assert_close(mine, step(theirs, x, y), 1e-8)


@pytest.mark.parametrize("backend", ["auto", "reference", NATIVE, COMPILED])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("placement", ["standard", "3x3"])
@pytest.mark.parametrize("name", ["resnet8", "resnet50", pytest.param("preresnet164", marks=pytest.mark.slow)])
def test_identity_gates_leave_the_plain_networks_output_bit_equal(backend, training, placement, name):
    networks = []
    for se in (None, SEConfig(identity_init=True, placement=placement)):
        torch.manual_seed(7)
        networks.append(senet.create_model(name, num_classes=4, se=se).train(training))
    x = torch.randn(2, 3, 64, 64)
    if backend == "auto" and training and placement == "3x3":
        # Small maps inside a block take PyTorch's batch norm without a gate, C++ with one: the same but for rounding.
        networks, x = [model.double() for model in networks], x.double()
    with torch.no_grad(), senet.use_backend(backend):
        plain, gated = (model(x) for model in networks)
    if x.dtype == torch.float64:
        torch.testing.assert_close(plain, gated, rtol=1e-10, atol=1e-10)
    else:
        assert torch.equal(plain, gated)


def small(**config):
    return senet.create_model("resnet8", num_classes=10, in_chans=1, se=SEConfig(reduction=4, **config))


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
def test_two_hundred_steps_on_digits_have_the_references_loss_curve():
    """Batches of 256: there float32's rounding alone moves the curve by 3e-4; with 32 it would be 1e-2 (ReLUs flip)."""
    digits = load_digits()
    x = torch.as_tensor(digits.images).float()[:, None]
    x, y = (x - x.mean()) / x.std(), torch.as_tensor(digits.target).long()
    curves = []
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        model, losses = small(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        with senet.use_backend(backend):
            for index in range(200):
                batch = torch.arange(256 * index, 256 * (index + 1)) % len(x)
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-20:].mean() < 0.3 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=1e-3)


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@LAYOUTS
def test_two_runs_give_the_same_bits(layout):
    torch.manual_seed(0)
    model, x, y = small().to(memory_format=layout), torch.randn(8, 1, 16, 16), torch.arange(8)
    with senet.use_backend("native"):
        runs = [step(copy.deepcopy(model), x.to(memory_format=layout), y) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@DYNAMO
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("backend", ["auto", "reference", NATIVE, COMPILED])
def test_an_outer_compiler_sees_one_graph_with_the_same_result(backend, training):
    torch.compiler.reset()
    model, x, y = small().double(), torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.arange(4)
    whole = torch.compile(copy.deepcopy(model).train(training), fullgraph=True, backend="aot_eager")
    with senet.use_backend("reference"):
        expected = step(copy.deepcopy(model), x, y) if training else model.eval()(x)
    with senet.use_backend(backend):
        if not training:
            torch.testing.assert_close(whole(x), expected, rtol=1e-10, atol=1e-10)
            return
        mine = {name.replace("_orig_mod.", ""): value for name, value in step(whole, x, y).items()}
        assert_close(mine, expected, 1e-9)


@DYNAMO
def test_an_outer_compiler_traces_what_use_backend_says():
    """The reference's batch norm, or the sweeps' moments; and another choice compiles anew."""
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    tail, norm, se, u = senet.ResidualTail(), nn.BatchNorm2d(8), SqueezeExcite(8), torch.randn(2, 8, 5, 5)
    compiled = torch.compile(lambda u: tail(u, norm, se, u), backend=keep, fullgraph=True)
    for name in ("reference", "auto", "reference"):
        with senet.use_backend(name):
            compiled(u)
    assert ["batch_norm" in graph for graph in graphs] == [True, False]
    assert ["var_mean" in graph for graph in graphs] == [False, True]
    norm.eval()
    compiled(u)
    assert "batch_norm" in graphs[-1]  # frozen: left for the compiler to fold


@DYNAMO
def test_exported_networks_know_nothing_of_our_operations():
    model, x = small().eval(), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for backend in ("auto", "native" if not NO_COMPILER else "reference"):
            with senet.use_backend(backend):
                program = torch.export.export(model, (x,))
            assert not any("senet" in str(node.target) for node in program.graph.nodes)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


# A step of one network in two processes, each with half of the batch and with statistics of its own.
RANK = """
import json, senet, torch
from torch import nn
backend, *options = settings
for number, each in enumerate(options):
    model, x, y = torch.load(f"{folder}/case.pt", weights_only=False)
    model = nn.parallel.DistributedDataParallel(model, **json.loads(each))
    with senet.use_backend(backend):
        nn.functional.cross_entropy(model(x.chunk(2)[int(rank)]), y.chunk(2)[int(rank)]).backward()
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/{rank}-{number}.pt")
"""


def test_distributed_data_parallel_gives_the_mean_of_the_halves_gradients(tmp_path, in_two_processes):
    options = ({}, {"static_graph": True, "gradient_as_bucket_view": True})
    model, x, y = small().double(), torch.randn(6, 1, 16, 16, dtype=torch.float64), torch.arange(6)
    torch.save((model, x, y), tmp_path / "case.pt")
    in_two_processes(tmp_path, RANK, "reference" if NO_COMPILER else "native", *map(json.dumps, options))
    with senet.use_backend("reference"):
        first, second = (step(copy.deepcopy(model), *half) for half in zip(x.chunk(2), y.chunk(2), strict=True))
    expected = {name: (first[f"d{name}"] + second[f"d{name}"]) / 2 for name, _ in model.named_parameters()}
    for rank in "01":
        for number, _ in enumerate(options):
            assert_close(torch.load(tmp_path / f"{rank}-{number}.pt"), expected, 1e-9)
