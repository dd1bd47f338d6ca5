"""What the proofs of the fast tails share: one case, run by any implementation and by plain PyTorch under autograd."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from senet import SEConfig, SqueezeExcite
from senet.ops import reference
from senet.ops.tail import inductor as compiler
from senet.ops.tail.tail import norm_tail

# The names of implementations that differ from those of ``ops.tail.choice``.
AS_BACKEND = {"definitions": "traced", "reference": "definitions"}
BATCH_NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout of memory: two that the sweeps are made for, and three that they are not."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # the last two axes swapped in memory
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # every other column of a wider map
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    if layout == "batch_inside":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert layout == "contiguous"
    return x.contiguous()


@dataclass
class Case:
    """A residual tail with its data. ``run`` works on copies, so that all implementations start alike."""

    u: Tensor
    norm: nn.Module | None
    se: SqueezeExcite | None
    shortcut: Tensor | None
    dout: Tensor
    relu: bool = True

    def run(self, implementation: str, wide: bool = False) -> dict[str, Tensor]:
        """Output, gradients of what requires one, and buffers by name; ``wide`` computes in float64.

        ``"autograd"`` is ``ops/reference.py``, ``"definitions"`` the sweeps as an outer torch.compile traces them,
        anything else the name of a backend (``"reference"``: the definitions behind the hand-written gradients).
        """
        case = copy.deepcopy(self)
        if wide:
            case = case.double()
        inputs = {"u": case.u, "shortcut": case.shortcut}
        for module in (case.norm, case.se):
            inputs |= dict(module.named_parameters()) if module is not None else {}
        out = case.forward(implementation)
        out.backward(case.dout)
        assert not compiler._broken
        results = {"out": out.detach()}
        results |= {f"d{name}": x.grad for name, x in inputs.items() if x is not None and x.requires_grad}
        return results | (dict(case.norm.named_buffers()) if case.norm is not None else {})

    def forward(self, implementation: str) -> Tensor:
        if implementation == "autograd":
            return reference.residual_tail(self.u, self.norm, self.se, self.shortcut, self.relu)
        excitation = None
        if self.se is not None:
            excitation = self.se.fully_connected() if implementation == "native" else self.se.excitation
        backend = AS_BACKEND.get(implementation, implementation)
        return norm_tail(self.u, self.norm, excitation, self.shortcut, self.relu, backend)

    def double(self) -> "Case":
        def widened(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

        modules = [None if m is None else m.double() for m in (self.norm, self.se)]
        return Case(widened(self.u), *modules, widened(self.shortcut), self.dout.double(), self.relu)


def make_case(
    shape: tuple[int, ...] = (3, 8, 5, 4),
    norm: str | None = "batch",
    gate: str | None = "sigmoid",
    shortcut: bool = True,
    relu: bool = True,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    **norm_options: object,
) -> Case:
    """A case with random data whose channels have means of some deviations, and weights that are not a start's."""
    channels = shape[1]
    over = (1, channels, *(1,) * (len(shape) - 2))
    table = reference.table_dtype(dtype)
    made: nn.Module | None = None
    if norm == "batch":
        made = BATCH_NORMS[len(shape)](channels, **norm_options)
    elif norm is not None:
        made = nn.GroupNorm(int(norm), channels, **norm_options)
    se = None
    if gate is not None:
        identity, _, name = gate.rpartition("identity_")
        se = SqueezeExcite(channels, SEConfig(reduction=2, gate=name, identity_init="identity_" in gate))
        assert not identity
    for module in (made, se):
        for parameter in module.parameters() if module is not None else ():
            nn.init.normal_(parameter, mean=1.0 if parameter is getattr(made, "weight", None) else 0.0, std=0.4)
    if isinstance(made, nn.modules.batchnorm._BatchNorm) and made.running_mean is not None:
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2.0)

    def random_map() -> Tensor:
        return torch.randn(shape, dtype=torch.float64) * 1.5 + 2 * torch.randn(over, dtype=torch.float64)

    def leaf(x: Tensor) -> Tensor:
        return strided(x.to(dtype), layout).detach().requires_grad_()

    return Case(
        leaf(random_map()),
        made.to(table) if made is not None else None,
        se.to(table) if se is not None else None,
        leaf(random_map()) if shortcut else None,
        strided(torch.randn(shape, dtype=torch.float64).to(dtype), layout),
        relu,
    )


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, maps: float = 0.0) -> None:
    """Equal to ``tolerance`` relative to each tensor's largest value; maps to ``maps`` if given. Counters are equal."""
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        mine = actual[name]
        assert mine.shape == right.shape, name
        if not right.is_floating_point():
            assert torch.equal(mine, right), name
            continue
        allowed = maps if maps and name in ("out", "du", "dshortcut") else tolerance
        error = (mine.double() - right.double()).abs().max() / right.abs().max().clamp_min(1e-3)
        assert error <= allowed, f"{name}: {error:.2e}"


@pytest.fixture
def case():
    return make_case


@pytest.fixture
def agree():
    return assert_agree
