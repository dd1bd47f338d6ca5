"""Statistics: running ones as PyTorch's, of badly scaled data, and those of a batch that is spread over processes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from senet.ops.dispatch import sweeps_of
from senet.ops.tail import native
from senet.ops.tail import norms as tables
from senet.ops.tail.definitions import pivot
from senet.ops.tail.norms import norm_of, norm_tables, uses_batch_statistics
from senet.ops.tail.tail import norm_tail

NO_COMPILER = native.why_not() is not None
NATIVE = pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")])
BACKENDS = ["definitions", NATIVE, COMPILED]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 1.0}, {"affine": False}], ids=str)
def test_running_statistics_over_several_batches_are_batch_norms(case, backend, options):
    one = case(dtype=torch.float64, gate=None, **options)
    theirs = nn.BatchNorm2d(8, **options).double()
    theirs.load_state_dict(one.norm.state_dict())
    for batch in (3, 1, 5):
        u = torch.randn(batch, 8, 6, 5, dtype=torch.float64) * 3 + 2
        norm_tail(u, one.norm, None, None, False, backend)
        theirs(u)
        assert one.norm.num_batches_tracked == theirs.num_batches_tracked
        torch.testing.assert_close(one.norm.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.norm.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_value_a_channel_is_refused_as_pytorch_does(backend):
    for gate in (None, nn.Identity()):
        with pytest.raises(ValueError, match="1 value per channel"):
            norm_tail(torch.randn(1, 4, 1, 1), nn.BatchNorm2d(4), gate, None, True, backend)
    norm_tail(torch.randn(1, 4, 1, 1), nn.BatchNorm2d(4).eval(), None, None, True, backend)


def test_what_counts_as_statistics_of_the_batch():
    assert uses_batch_statistics(nn.BatchNorm2d(3))
    assert not uses_batch_statistics(nn.BatchNorm2d(3).eval())
    assert uses_batch_statistics(nn.BatchNorm2d(3, track_running_stats=False).eval())
    assert uses_batch_statistics(nn.GroupNorm(1, 3).eval())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norms_tables(groups):
    norm = nn.GroupNorm(groups, 6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    u = torch.randn(3, 6, 4, 5, dtype=torch.float64) + torch.arange(6.0)[:, None, None]
    m, d, v = sweeps_of("reference").moments(u)
    g, z = norm_tables(norm_of(norm), m, d, v, pivot(u), 20)
    y = g[..., None, None] * (u - m[..., None, None]) + z[..., None, None]
    torch.testing.assert_close(y, norm(u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, norm(u).mean((2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [2, 9, 56, 112])
@pytest.mark.parametrize("outlier", [False, True])
def test_the_variance_of_badly_scaled_data_keeps_five_digits(backend, layout, side, outlier):
    u = (torch.randn(2, 5, side, side) + 1e4).to(memory_format=layout)
    if outlier:
        u[:, :, 0, 0] = -1e4
    exact_v, exact_m = torch.var_mean(u.double(), (2, 3), correction=0)
    m, d, v = sweeps_of(backend).moments(u)
    # Compiled code adds value after value, on top of an outlier as large as the mean: half a digit less.
    loose = 3 if backend == "compiled" and outlier else 1
    torch.testing.assert_close(v.double(), exact_v, rtol=loose * 1e-5, atol=0)
    close_to_mean = {"rtol": 2e-6, "atol": 5e-4 * exact_v.max().sqrt().item()}  # a part of the deviation
    torch.testing.assert_close(m.double(), exact_m, **close_to_mean)
    torch.testing.assert_close(sweeps_of(backend).mean(u).double(), exact_m, **close_to_mean)
    from_pivot = exact_m - u[0, :, 0, 0].double()
    all_digits = close_to_mean if outlier else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(d.double(), from_pivot, **all_digits)
    norm = nn.BatchNorm2d(5, momentum=1.0)
    norm_tail(u, norm, None, None, True, backend)
    exact = torch.var(u.double(), (0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), exact, rtol=loose * 1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6)], ids=["batch", "group"])
def test_the_normalised_map_of_badly_scaled_data_keeps_five_digits(backend, norm):
    u = torch.randn(4, 6, 3, 3) + 1e4 + torch.arange(6.0)[:, None, None]
    exact = copy.deepcopy(norm).double()(u.double())
    y = norm_tail(u, norm, None, None, False, backend)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_ranks_compare_badly_scaled_means_to_all_digits(monkeypatch):
    u, counts = torch.randn(6, 5, 3, 3) + 1e4, (2, 0, 4)
    norm = nn.SyncBatchNorm(5, momentum=1.0)
    rows = []
    for part in u.split(counts):  # what each rank hands over
        m, d, v = sweeps_of("reference").moments(part)
        with monkeypatch.context() as patched:
            patched.setattr(tables._AllGather, "apply", lambda own, group: rows.append(own) or own[None])
            tables._gathered(d, v, pivot(part), len(part) * 9, None)
    monkeypatch.setattr(tables, "group_of", lambda module: "two ranks")
    monkeypatch.setattr(tables._AllGather, "apply", lambda own, group: torch.stack(rows))
    g, z = norm_tables(norm_of(norm), m, d, v, pivot(part), 9)
    torch.testing.assert_close(norm.running_var.double(), u.double().var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_mean.double(), u.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    y = g[..., None, None] * (part - m[..., None, None]) + z[..., None, None]
    exact = nn.BatchNorm2d(5).double()(u.double())[2:]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


# Each of two processes makes the whole case, keeps its part of the batch, and saves what comes out for each setting.
RANK = """
import importlib.util, torch
from torch import nn
conftest, *settings = settings
spec = importlib.util.spec_from_file_location("cases", conftest)
sys.modules["cases"] = cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
for setting in settings:
    implementation, first, second = setting.split()
    torch.manual_seed(0)
    one = cases.make_case((4, 6, 5, 3))
    cut = (int(first), int(second))
    u, shortcut, one.dout = (x.detach().split(cut)[int(rank)] for x in (one.u, one.shortcut, one.dout))
    one.u, one.shortcut = u.requires_grad_(), shortcut.requires_grad_()
    one.norm = nn.SyncBatchNorm.convert_sync_batchnorm(one.norm)
    mine = one.run(implementation)
    for name, value in mine.items():
        if name.startswith("d") and name not in ("du", "dshortcut"):
            dist.all_reduce(value)  # DDP averages; the sum is the gradient of the whole batch's summed loss
    torch.save(mine, f"{folder}/{setting} {rank}.pt")
"""
SETTINGS = ["definitions 2 2", "definitions 1 3", "definitions 0 4"]
SETTINGS += [] if NO_COMPILER else ["native 2 2", "native 1 3"]  # an empty map takes the definitions


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, in_two_processes):
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(folder, RANK, str(Path(__file__).parents[1] / "conftest.py"), *SETTINGS)
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_synchronised_over_two_processes_is_batch_norm_of_the_whole_batch(case, agree, ranks, setting):
    torch.manual_seed(0)
    expected = case((4, 6, 5, 3)).run("autograd")
    first, second = (torch.load(ranks / f"{setting} {rank}.pt") for rank in "01")
    whole = {}
    for name in expected:
        maps = name in ("out", "du", "dshortcut")
        whole[name] = torch.cat((first[name], second[name])) if maps else second[name]
        assert maps or torch.equal(first[name], second[name]), name
    agree(whole, expected, 1e-10)
