"""Accelerated networks in two processes: DistributedDataParallel and synchronized batch norms."""

import copy

import pytest
import torch
from torch.nn import functional as F

import senet
from helpers.images import maps
from senet import SEConfig

LABELS = torch.arange(6)

# A step in two processes, each with half of the batch. ``network`` is the accelerated one.
RANK = """
import senet, torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
model, x, y = torch.load(f"{folder}/case.pt", weights_only=False)
halves = list(zip(x.chunk(2), y.chunk(2)))
mine, other = halves[int(rank)], halves[1 - int(rank)]
def step(network, x, y):
    F.cross_entropy(network(x), y).backward()
"""
DATA_PARALLEL = (
    RANK
    + """
def gradients():
    taken = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    return taken
results, network = {}, senet.accelerate(model)
parallel = DDP(network, static_graph=True, gradient_as_bucket_view=True)
step(parallel, *mine)
results["static"] = {name: value.clone() for name, value in gradients().items()}
parallel = DDP(network)
step(parallel, *mine)
results["each"] = gradients()
with parallel.no_sync():
    step(parallel, *mine)
results["alone"] = gradients()
with parallel.no_sync():
    step(parallel, *mine)
step(parallel, *other)
results["both"] = gradients()
assert len(network.acceleration.training) == 7, network.acceleration
assert network.acceleration.graphs == {"training": 1}, network.acceleration
torch.save(results, f"{folder}/{rank}.pt")
"""
)
# PyTorch's SyncBatchNorm runs on GPUs only; this norm computes the same with a sum over the processes.
SYNCHRONIZED = (
    RANK
    + """
from torch.distributed.nn.functional import all_reduce
class SumOfProcesses(nn.BatchNorm2d):
    def forward(self, u):
        if not self.training:
            return super().forward(u)
        n = 2 * u.numel() // u.shape[1]
        mean = all_reduce(u.sum((0, 2, 3))) / n
        var = all_reduce((u - mean.view(-1, 1, 1)).square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        u = (u - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + self.eps).sqrt()
        return u * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
for norm in model.modules():
    if isinstance(norm, nn.BatchNorm2d):
        norm.__class__ = SumOfProcesses
network = senet.accelerate(model)
parallel = DDP(network)
for _ in range(2):
    step(parallel, *mine)
with torch.no_grad():
    out = network.eval()(x)
assert len(network.acceleration.inference) == 3, network.acceleration
gradients = {f"d{name}": p.grad for name, p in network.named_parameters()}
torch.save({"out": out} | gradients | dict(network.named_buffers()), f"{folder}/{rank}.pt")
"""
)


def case(folder):
    """A network in float64 and a batch, saved for both processes."""
    model = senet.create_model("resnet8", num_classes=10, in_chans=1, se=SEConfig(reduction=4)).double().train()
    x = maps(6, 1, 16, 16, dtype=torch.float64)
    torch.save((model, x, LABELS), folder / "case.pt")
    return model, x


def gradients(model, x, y):
    model = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(mine, right):
    assert mine.keys() == right.keys()
    for name, expected in right.items():
        error = (mine[name].double() - expected.double()).abs().max()
        assert error <= 1e-9 * expected.double().abs().max().clamp_min(1e-6), f"{name}: {error:.2e}"


def test_data_parallel_gives_the_mean_of_the_halves_gradients(tmp_path, in_two_processes):
    model, x = case(tmp_path)
    in_two_processes(tmp_path, DATA_PARALLEL)
    halves = [gradients(model, *half) for half in zip(x.chunk(2), LABELS.chunk(2), strict=True)]
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert_close(results["each"], mean)
        assert_close(results["static"], mean)
        assert_close(results["alone"], halves[rank])
        assert_close(results["both"], {name: 2 * value for name, value in mean.items()})


@pytest.mark.slow
def test_synchronized_norms_see_the_whole_batch(tmp_path, in_two_processes):
    model, x = case(tmp_path)
    in_two_processes(tmp_path, SYNCHRONIZED)
    for _ in range(2):
        F.cross_entropy(model(x), LABELS).backward()
    with torch.no_grad():
        out = model.eval()(x)
    expected = {"out": out} | {f"d{name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
