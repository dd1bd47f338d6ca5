"""The end of a residual block in the fastest form that computes the same function: δ(SE(norm(u)) + shortcut)."""

import functools
from typing import Any

from torch import Tensor, nn

from senet.ops import reference
from senet.ops.tail.autograd import two_sweeps
from senet.ops.tail.choice import Choice, Form, Gate, choose, one_call_of
from senet.ops.tail.norms import Norm, gathers, norm_of


def tail(
    u: Tensor,
    norm: Norm | None,
    gate: Gate | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str = "auto",
    shortcut_norm: Norm | None = None,
) -> Tensor:
    """δ(SE(norm(u)) + shortcut), where every part is optional.

    Args:
        u: (N, C, *S), one to three spatial axes, any layout, float16, bfloat16, float32, or float64.
        norm: a ``BatchNorm`` or a ``GroupNorm``, or None.
        gate: from squeezed channels to the gate, (N, C) → (N, C): any function or ``reference.FullyConnected``. None
            is the plain network.
        shortcut: a tensor with the shape of u, or None.
        relu: whether a ReLU ends the block.
        backend: see ``choice.choose``, which decides for each call.
        shortcut_norm: the norm of a projection shortcut, which is applied to ``shortcut``.

    Returns:
        A feature map with the shape, dtype, and layout of u.

    Raises:
        ValueError: batch norm with the statistics of the batch got a single value per channel.
        RuntimeError: double backward: the fast sweeps have no second derivative (``"traced"`` ones do).
    """
    choice = choose(u, norm, gate, shortcut, relu, backend, shortcut_norm)
    return run(choice, u, norm, gate, shortcut, relu, shortcut_norm)


def run(
    choice: Choice,
    u: Tensor,
    norm: Any,
    gate: Any,
    shortcut: Tensor | None,
    relu: bool,
    shortcut_norm: Any = None,
) -> Tensor:
    """The tail in the form of a choice that was made for these arguments."""
    if shortcut is not None and shortcut_norm is not None and not choice.joins:
        shortcut, shortcut_norm = _normalized(shortcut, shortcut_norm), None
    if choice.form is Form.OPERATIONS:
        se = None if gate is None else functools.partial(_rescaled, gate)
        return reference.residual_tail(u, norm, se, shortcut, relu)
    if choice.form is Form.ONE_CALL:
        call = one_call_of(choice.backend).batch_norm_tail
        return call(u, norm, gate, shortcut, relu, shortcut_norm)
    return two_sweeps(u, norm, gate, shortcut, relu, None if choice.form is Form.TRACED else choice.backend)


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    return two_sweeps(x, norm, None, None, False, None) if gathers(norm) else norm(x)


def _rescaled(gate: Gate, y: Tensor) -> Tensor:
    return reference.scale(y, gate(reference.squeeze(y)))


# The number of axes of a norm's input. Norms that are not listed accept any number.
_AXES: dict[type, int] = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def norm_tail(
    u: Tensor,
    norm: nn.Module | None,
    gate: Gate | None,
    shortcut: Tensor | None,
    relu: bool,
    backend: str,
    shortcut_norm: nn.Module | None = None,
) -> Tensor:
    """The same with norms as modules, ``norms.NORMS``; ``shortcut_norm`` may be any module."""
    if u.ndim != _AXES.get(type(norm), u.ndim):
        assert norm is not None
        norm(u)  # raises PyTorch's error
    if shortcut is not None and shortcut_norm is not None and type(shortcut_norm) not in _AXES:
        shortcut, shortcut_norm = shortcut_norm(shortcut), None
    value, of_shortcut = (None if module is None else norm_of(module) for module in (norm, shortcut_norm))
    return tail(u, value, gate, shortcut, relu, backend, of_shortcut)
