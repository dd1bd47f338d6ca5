"""The passes that docs/zero-tax.md counts are those that PyTorch, and the sweeps, make."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from senet.nn.squeeze_excite import SqueezeExcite
from senet.ops.reference import residual_tail
from senet.ops.tail.tail import norm_tail

SHAPE = (3, 32, 9, 5)


@pytest.fixture
def passes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import passes

    return passes


# Batch norm looks at its map, and at the gradient, once more for the sums.
INSIDE = {"aten.native_batch_norm.default": 1, "aten.native_batch_norm_backward.default": 2}


class Transfers(TorchDispatchMode):
    """Counts the maps that operations take and return; what is broadcast is no map, a view moves nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(map(is_map, tree_leaves((args, kwargs, out)))) + INSIDE.get(str(func), 0)
        return out


def is_map(x):
    return isinstance(x, torch.Tensor) and x.shape == SHAPE and 0 not in x.stride()


def counted(tail):
    u, shortcut = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    dout = torch.randn(SHAPE)
    norm, se = nn.BatchNorm2d(SHAPE[1]), SqueezeExcite(SHAPE[1])
    with Transfers() as forward:
        out = tail(u, norm, se, shortcut)
    with Transfers() as backward:
        torch.autograd.grad(out, [u, shortcut, *norm.parameters(), *se.parameters()], dout, allow_unused=True)
    return forward.count, backward.count


def test_passes_are_counted_right(passes):
    assert counted(lambda u, norm, se, shortcut: residual_tail(u, norm, se, shortcut, True)) == (11, 18)
    assert counted(lambda u, norm, se, shortcut: residual_tail(u, norm, None, shortcut, True)) == (8, 8)
    assert counted(lambda u, norm, se, shortcut: norm_tail(u, norm, se.excitation, shortcut, True, "definitions")) == (
        4,
        7,
    )
    found = [passes.transfers(each) for each in (passes.EAGER, passes.PLAIN, passes.SWEEPS)]
    assert found == [(11, 18), (8, 8), (4, 7)]


def test_the_figure_is_the_same_every_time(passes, tmp_path):
    for name in ("a.svg", "b.svg"):
        passes.draw(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
