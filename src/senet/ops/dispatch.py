"""The registry of backends for the sweeps. The backend is selected by name, by environment, or from measurements."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from senet.errors import InputError
from senet.ops.tail import inductor as compiler
from senet.ops.tail import native
from senet.ops.tail.reasons import Reason

NAMES = ("auto", "reference", "compiled", "native", "triton")


@dataclass(frozen=True)
class Sweeps:
    """One implementation of the sweeps; each function has the signature and meaning of its definition.

    The definitions are in ``senet.ops.tail.definitions``.
    """

    moments: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    mean: Callable[[Tensor], Tensor]
    affine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
    affine_backward: Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    moments_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# The number of elements of a feature map from which the native sweeps are faster, after a convolution has evicted the
# caches. Measured by benchmarks/crossover.py: with SE, for all sizes; without SE, from 2^18 on. The limit is the same
# for both, because twins must run the same code for their outputs to be bit-equal.
SMALLEST_NATIVE = 2**14
# For a norm and a ReLU only. Key: whether the map is channels_last.
SMALLEST_NATIVE_BARE = {True: 2**19, False: 2**17}

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("senet_backend", default=None)


def why_not(name: str) -> str | None:
    """The reason why a backend cannot run on this machine, or None if it can."""
    if name == "compiled":
        return compiler.why_not()
    if name == "native":
        return native.why_not()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no CUDA device was found"
    return None


def _checked(name: str, origin: str) -> str:
    if name not in NAMES:
        raise InputError(f"{origin}={name!r} is not a backend; choose one of {', '.join(NAMES)}")
    reason = why_not(name)
    if reason is not None:
        raise InputError(f"{origin}={name!r} cannot run here: {reason}; use 'auto' or 'reference'")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the implementation of norm + SE + shortcut + ReLU within a ``with`` block, in this thread or task.

    Args:
        name: ``"reference"``: plain PyTorch, one operation at a time; ``"compiled"``: the two-sweep form under
            ``torch.compile``; ``"native"``: the two-sweep form in C++ (CPU); ``"triton"``: the two-sweep form in
            hand-written kernels (CUDA); ``"auto"``: the fastest one for the device, dtype, and size of each feature
            map. Within an outer ``torch.compile``, every name but ``"reference"`` selects the two-sweep form, which
            the compiler fuses.

    Raises:
        InputError: the name is unknown, or the backend cannot run on this machine (the message says why).
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """The selected backend: from the innermost ``use_backend``, else from ``SENET_BACKEND``, else ``"auto"``."""
    return _chosen.get() or _from_environment(os.environ.get("SENET_BACKEND", "auto"))


@functools.cache
def _from_environment(value: str) -> str:
    return _checked(value, "SENET_BACKEND")


def backend_for(u: Tensor, frozen: bool = False, bare: bool = False) -> str:
    """The backend for the feature map ``u``: the selected one, or the choice of ``"auto"``. See below."""
    return implementation_for(u, "auto", frozen, bare)[0]


def implementation_for(u: Tensor, name: str, frozen: bool, bare: bool) -> tuple[str, Reason]:
    """The backend for the feature map ``u``, by device, dtype, and size, and the reason why it is not a faster one.

    Args:
        u: (N, C, *S), the input of the tail.
        name: the name of a backend, or ``"auto"`` for the selected one.
        frozen: the norm uses running statistics. On a CPU, the operations of PyTorch are faster then; use
            ``senet.accelerate`` for fast inference.
        bare: there is neither a gate nor a shortcut.

    Raises:
        InputError: the selected backend does not support the device or dtype of the map.
    """
    name = current_backend() if name == "auto" else name
    if u.device.type == "meta":
        return "reference", Reason.DEVICE
    if name == "native" and (u.device.type != "cpu" or u.dtype not in native.TYPES):
        types = ", ".join(native.TYPES.values())
        raise InputError(f"backend 'native' got a {u.dtype} feature map on {u.device}; it supports {types} on the CPU")
    if name == "triton" and not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise InputError(f"backend 'triton' got a feature map on {u.device}; it supports CUDA devices only")
    if name != "auto":
        return name, Reason.REQUESTED
    if u.device.type == "cuda":
        found = next((n for n in ("triton", "compiled") if _available(n)), None)
        return (found, Reason.FASTEST) if found else ("reference", Reason.UNAVAILABLE)
    if u.device.type != "cpu":
        return "reference", Reason.DEVICE
    reason = _not_native(u, frozen, bare)
    return ("native", Reason.FASTEST) if reason is None else ("reference", reason)


def _not_native(u: Tensor, frozen: bool, bare: bool) -> Reason | None:
    if frozen:
        return Reason.FROZEN
    if u.numel() < (SMALLEST_NATIVE_BARE[not u.is_contiguous()] if bare else SMALLEST_NATIVE):
        return Reason.SIZE
    if u.dtype not in native.TYPES:
        return Reason.DTYPE
    return None if _available("native") else Reason.UNAVAILABLE


@functools.cache
def _available(name: str) -> bool:
    reason = why_not(name)
    if reason is not None and name == "native":
        message = f"senet: the fast CPU code is not used: {reason}. Set SENET_BACKEND=reference to silence this warning"
        warnings.warn(message, stacklevel=2)
    return reason is None


@functools.cache
def sweeps_of(name: str) -> Sweeps:
    """The functions of a backend. ``"reference"`` and ``"definitions"`` return the definitions themselves."""
    homes = {"reference": "definitions", "compiled": "inductor"}
    module = importlib.import_module(f"senet.ops.tail.{homes.get(name, name)}")
    return Sweeps(module.moments, module.mean, module.affine, module.affine_backward, module.moments_backward)
