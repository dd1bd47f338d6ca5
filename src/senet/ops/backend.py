"""The registry of implementations of the sweeps: one explicit choice, by name, by environment or by measurement."""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from senet.errors import InputError
from senet.ops import compiler
from senet.ops.native import sweeps as native

NAMES = ("auto", "reference", "compiled", "native", "triton")


@dataclass(frozen=True)
class Sweeps:
    """One implementation of the sweeps; each function has the signature and meaning of its namesake in ``sweeps``."""

    moments: Callable[[Tensor], tuple[Tensor, Tensor]]
    mean: Callable[[Tensor], Tensor]
    affine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
    affine_backward: Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    moments_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# From how many elements a map is worth the calls of the native sweeps. Measured: benchmarks/crossover.py.
SMALLEST_NATIVE = 2**15

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("senet_backend", default=None)


def why_not(name: str) -> str | None:
    """Why a backend cannot run on this machine, in words; None if it can."""
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
        raise InputError(f"{origin}={name!r} is not a backend; there are {', '.join(NAMES)}")
    reason = why_not(name)
    if reason is not None:
        raise InputError(f"{origin}={name!r} cannot run here: {reason}; use 'auto' or 'reference'")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of norm + SE + shortcut + ReLU within a ``with`` block, in this thread or task.

    Args:
        name: ``"reference"``: plain PyTorch, operation by operation; ``"compiled"``: the two-sweep form under
            ``torch.compile``; ``"native"``: the same in C++ (CPU); ``"triton"``: the two-sweep form in hand-written kernels (CUDA); ``"auto"``: the fastest
            of them for each map's device, type and size.

    Raises:
        InputError: the name is unknown, or that backend cannot run on this machine (the message says why).
    """
    token = _chosen.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """The name in force: that of the innermost ``use_backend``, else of ``SENET_BACKEND``, else ``"auto"``."""
    return _chosen.get() or _from_environment(os.environ.get("SENET_BACKEND", "auto"))


@functools.cache
def _from_environment(value: str) -> str:
    return _checked(value, "SENET_BACKEND")


def backend_for(u: Tensor) -> str:
    """The implementation that a map gets: the named one, or ``"auto"``'s choice by device, type and size."""
    name = current_backend()
    if name != "auto" or u.device.type == "meta":
        return "reference" if u.device.type == "meta" else name
    if u.device.type == "cuda":
        return next((n for n in ("triton", "compiled") if _available(n)), "reference")
    if u.device.type == "cpu" and u.numel() >= SMALLEST_NATIVE and u.dtype in native.TYPES and _available("native"):
        return "native"
    return "reference"


@functools.cache
def _available(name: str) -> bool:
    return why_not(name) is None


@functools.cache
def sweeps_of(name: str) -> Sweeps:
    """The functions of a backend. ``"reference"`` gives the definitions themselves."""
    home = {"reference": "senet.ops.sweeps", "compiled": "senet.ops.compiler", "native": "senet.ops.native.sweeps", "triton": "senet.ops.triton_kernels"}
    module = importlib.import_module(home[name])
    return Sweeps(module.moments, module.mean, module.affine, module.affine_backward, module.moments_backward)
