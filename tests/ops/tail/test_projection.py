"""A projection's norm in the same sweeps as the branch's: the same function."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import senet
from helpers.tails import tail
from senet import SEConfig, SqueezeExcite
from senet.ops.tail import native, native_batch_norm

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no C++ compiler")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def in_one_call(monkeypatch):
    """For each tail that the library computed in one call: whether a projection's norm was in it."""
    seen = []

    def spy(function, *args):
        seen.append(len(args) > 5 and args[5] is not None)
        return function(*args)

    monkeypatch.setattr(native_batch_norm, "batch_norm_tail", partial(spy, native_batch_norm.batch_norm_tail))
    return seen


class End(nn.Module):
    """A block's end with a projection: both norms with weights and statistics that are not a start's."""

    def __init__(self, channels=8, gate=None, relu=True, norm=None, shortcut_norm=None):
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(channels)
        self.shortcut_norm = shortcut_norm or nn.BatchNorm2d(channels, eps=1e-2, momentum=0.3)
        self.se = SqueezeExcite(channels, SEConfig(reduction=2, gate=gate)) if gate else None
        self.relu = relu
        for parameter in (*self.norm.parameters(), *self.shortcut_norm.parameters()):
            nn.init.normal_(parameter, mean=0.5)

    def forward(self, u, v):
        return tail(u, self.norm, self.se, v, self.shortcut_norm, self.relu)


def maps(shape, layout="contiguous", dtype=torch.float64):
    over = torch.randn(1, shape[1], 1, 1, dtype=torch.float64)
    made = [torch.randn(shape, dtype=torch.float64) * scale + over for scale in (1.5, 0.7, 1.0)]
    return [x.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for x in made]


def run(end, backend, u, v, dout):
    """Output, all gradients and all statistics."""
    end, u, v = copy.deepcopy(end), u.clone().requires_grad_(), v.clone().requires_grad_()
    with senet.use_backend(backend):
        out = end(u, v)
    out.backward(dout)
    return {"out": out, "du": u.grad, "dv": v.grad, **dict(end.named_buffers())} | {
        f"d{name}": p.grad for name, p in end.named_parameters()
    }


def agree(mine, right, tolerance):
    assert mine.keys() == right.keys()
    for name, expected in right.items():
        error = (mine[name].double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", [None, "sigmoid", "tanh"])
@pytest.mark.parametrize("shape", [(3, 16, 6, 5), (1, 7, 3, 3), (5, 33, 1, 1), (2, 48, 31, 33)])
def test_it_is_the_reference(in_one_call, layout, gate, shape):
    end = End(shape[1], gate).double()
    data = maps(shape, layout)
    mine = run(end, "native", *data)
    whole_vectors = data[0].is_contiguous() or shape[1] % 16 == 0
    assert in_one_call == [whole_vectors]
    agree(mine, run(end, "reference", *data), 1e-10)
    assert mine["out"].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"), [(torch.float32, (140, 130), 2e-4), (torch.bfloat16, (190, 180), 3e-2)]
)
def test_other_types_and_maps_past_the_caches(in_one_call, layout, dtype, size, tolerance):
    end = End(64, "sigmoid")
    u, v, dout = maps((4, 64, *size), layout, dtype)  # over 16 MB
    wide = [x.double() for x in (u, v, dout)]
    # Where the ReLU is all but undecided, rounding decides: such positions get no gradient.
    with torch.no_grad(), senet.use_backend("reference"):
        before = copy.deepcopy(end).double()
        before.relu = False
        undecided = before(*wide[:2]).abs() < 0.2 * tolerance * wide[0].abs().max()
    dout, wide[2] = dout.masked_fill(undecided, 0), wide[2].masked_fill(undecided, 0)
    mine = run(end, "native", u, v, dout)
    assert in_one_call == [True]
    agree(mine, run(copy.deepcopy(end).double(), "reference", *wide), tolerance)


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"shortcut_norm": nn.BatchNorm2d(16, affine=False)}, True),
        ({"shortcut_norm": nn.BatchNorm2d(16, track_running_stats=False)}, True),
        ({"norm": nn.BatchNorm2d(16, affine=False, track_running_stats=False), "gate": "sigmoid"}, True),
        ({"shortcut_norm": nn.BatchNorm2d(16, momentum=None)}, True),
        ({"shortcut_norm": nn.BatchNorm2d(16).eval()}, False),
        ({"shortcut_norm": nn.GroupNorm(2, 16)}, False),
        ({"shortcut_norm": nn.InstanceNorm2d(16, affine=True)}, False),
        ({"norm": nn.GroupNorm(2, 16)}, None),
        ({"norm": nn.BatchNorm2d(16).eval()}, None),
        ({"relu": False}, False),
    ],
)
def test_every_norm(in_one_call, options, together):
    end = End(16, **options).double()
    data = maps((3, 16, 6, 5), "channels_last")
    agree(run(end, "native", *data), run(end, "reference", *data), 1e-10)
    assert in_one_call == ([] if together is None else [together])


def test_what_needs_no_gradient_gets_none_and_one_value_is_refused():
    end, (u, v, dout) = End(gate="sigmoid").double(), maps((3, 8, 6, 5))
    right = run(end, "reference", u, v, dout)
    end.norm.requires_grad_(False)
    v.requires_grad_()
    with senet.use_backend("native"):
        end(u, v).backward(dout)
        agree(
            {"dv": v.grad, "w": end.shortcut_norm.weight.grad},
            {"dv": right["dv"], "w": right["dshortcut_norm.weight"]},
            1e-10,
        )
        assert end.norm.weight.grad is None
        with pytest.raises(ValueError):  # noqa: PT011 - PyTorch's own, of one value a channel
            end(u[:1, :, :1, :1], v[:1, :, :1, :1])
        with pytest.raises(RuntimeError):  # PyTorch's own, of maps that cannot be added
            end(u, v[:, :, :2])
