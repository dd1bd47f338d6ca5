"""Which form computes a tail, by which backend, and why not a faster one: one decision, as a value."""

import functools
import importlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from senet.ops.border import fits_channels, readable
from senet.ops.dispatch import implementation_for
from senet.ops.reference import FullyConnected
from senet.ops.tail.norms import BatchNorm, Norm, gathers
from senet.ops.tail.reasons import Reason

Gate = FullyConnected | Callable[[Tensor], Tensor]


class Form(StrEnum):
    """The ways to compute a tail: PyTorch's operations, the definitions of the sweeps for a compiler, sweeps with
    autograd on the tables in between, and sweeps and tables in one call.
    """

    OPERATIONS = "operations"
    TRACED = "traced sweeps"
    SWEEPS = "sweeps"
    ONE_CALL = "sweeps in one call"


class Choice(NamedTuple):
    """The form of a tail, its backend, and the reason why it is not a faster one.

    ``joins`` says that the same call computes the norm of a projection shortcut.
    """

    form: Form
    backend: str
    reason: Reason
    joins: bool = False


@functools.cache
def one_call_of(backend: str) -> Any:
    """The module of a backend that computes a tail in one call, or None. (Importing Triton is slow.)"""
    homes = {"native": "native_batch_norm", "triton": "triton_batch_norm"}
    return importlib.import_module(f"senet.ops.tail.{homes[backend]}") if backend in homes else None


def choose(
    u: Tensor,
    norm: Norm | None,
    gate: Gate | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str = "auto",
    shortcut_norm: Norm | None = None,
) -> Choice:
    """The form that computes ``tail`` for these arguments.

    Inputs that kernels cannot read, such as tensors on another device, go through PyTorch's operations, which raise
    their own errors.

    Args:
        u, norm, gate, shortcut, relu, shortcut_norm: the arguments of ``tail``.
        backend: ``"auto"`` follows ``use_backend`` and ``SENET_BACKEND``; the name of a backend of
            ``senet.ops.dispatch`` requests that one; ``"traced"`` the definitions of the sweeps as a compiler fuses
            them; ``"definitions"`` the definitions with the hand-written gradients.

    Raises:
        InputError: the requested backend does not support the device or dtype of the map.
    """
    if backend == "traced":
        return Choice(Form.TRACED, "traced", Reason.COMPILER)
    reason = _unfit(u, norm, gate, shortcut)
    if reason is not None:
        return _ordinary(norm, reason)
    chosen = foresee(u, norm, gate, shortcut, relu, backend, shortcut_norm)
    if chosen.form is Form.OPERATIONS or _are_readable(u, norm, gate, shortcut, shortcut_norm):
        return chosen  # checking all tensors takes longer than a small feature map
    return _ordinary(norm, Reason.TENSOR)


def foresee(
    u: Tensor,
    norm: Norm | None,
    gate: Gate | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str = "auto",
    shortcut_norm: Norm | None = None,
) -> Choice:
    """The same for tensors that need not have memory, for which kernels are fit otherwise."""
    if backend == "traced":
        return Choice(Form.TRACED, "traced", Reason.COMPILER)
    if backend == "definitions":
        return Choice(Form.SWEEPS, "definitions", Reason.REQUESTED)
    frozen, bare = norm is not None and norm.frozen, gate is None and shortcut is None
    name, reason = implementation_for(u, backend, frozen, bare)
    if name == "reference":
        return _ordinary(norm, reason)
    library = one_call_of(name)
    unsuited = Reason.REQUESTED if library is None else library.unsuited(u, norm, gate)
    if library is None or unsuited is not None:
        return Choice(Form.SWEEPS, name, unsuited)
    joins = shortcut is not None and shortcut_norm is not None and library.joins(u, shortcut, shortcut_norm, relu)
    return Choice(Form.ONE_CALL, name, Reason.FASTEST, joins)


def _ordinary(norm: Norm | None, reason: Reason) -> Choice:
    if gathers(norm):  # other ranks may have other sizes, even empty batches; all ranks support this form
        return Choice(Form.TRACED, "traced", Reason.RANKS)
    return Choice(Form.OPERATIONS, "reference", reason)


def _unfit(u: Tensor, norm: Norm | None, gate: Gate | None, shortcut: Tensor | None) -> Reason | None:
    """Why no sweep can compute the tail, or None."""
    if norm is None and gate is None:
        return Reason.NOTHING
    if type(u) not in (Tensor, nn.Parameter) or torch.jit.is_tracing():
        return Reason.TENSOR
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return Reason.TRANSFORM
    if u.ndim < 3 or (shortcut is not None and shortcut.shape != u.shape):
        return Reason.SHAPE
    return None if u.numel() else Reason.EMPTY


def _are_readable(
    u: Tensor, norm: Norm | None, gate: Gate | None, shortcut: Tensor | None, shortcut_norm: Norm | None
) -> bool:
    """Whether kernels can read all tensors."""
    if not readable(u, shortcut) or (type(gate) is FullyConnected and not readable(u, *gate[:4])):
        return False
    for each in (norm, shortcut_norm):
        if each is not None:
            running = each[2:4] if isinstance(each, BatchNorm) else ()
            if not fits_channels(u, each.weight, each.bias, *running):
                return False
    return True
