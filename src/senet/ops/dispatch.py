"""The registry of implementations of the sweeps: one explicit choice, by name, by environment or by measurement."""

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

NAMES = ("auto", "reference", "compiled", "native", "triton")


@dataclass(frozen=True)
class Sweeps:
    """One implementation of the sweeps; each function has the signature and meaning of its namesake in ``sweeps``."""

    moments: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    mean: Callable[[Tensor], Tensor]
    affine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
    affine_backward: Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    moments_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# From how many elements on a map is worth the call of the native sweeps, after a convolution that has emptied the
# caches. Measured: python benchmarks/crossover.py. With SE any map is, without it those from 2^18 on; one size for
# both, as twins must take the same form for their outputs to be bit-equal.
SMALLEST_NATIVE = 2**14
# Only a norm and a ReLU, channels_last or not.
SMALLEST_NATIVE_BARE = {True: 2**19, False: 2**17}

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("senet_backend", default=None)
# The same for an outer torch.compile: Dynamo cannot read context variables before torch 2.12, but guards a plain value,
# so that another choice compiles anew. Threads that choose differently at a time may see each other's: the same maths.
_while_tracing: dict[str, str | None] = {"name": None}


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
            ``torch.compile``; ``"native"``: the same in C++ (CPU); ``"triton"``: the same in hand-written kernels
            (CUDA); ``"auto"``: the fastest of them for each map's device, type and size. Within an outer
            ``torch.compile`` there are two: ``"reference"``, and the two-sweep form for the compiler to fuse.

    Raises:
        InputError: the name is unknown, or that backend cannot run on this machine (the message says why).
    """
    token, before = _chosen.set(_checked(name, "use_backend")), _while_tracing["name"]
    _while_tracing["name"] = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _while_tracing["name"] = before


def current_backend() -> str:
    """The name in force: that of the innermost ``use_backend``, else of ``SENET_BACKEND``, else ``"auto"``."""
    return _chosen.get() or _from_environment(os.environ.get("SENET_BACKEND", "auto"))


@functools.cache
def _from_environment(value: str) -> str:
    return _checked(value, "SENET_BACKEND")


def traces_reference() -> bool:
    """Whether an outer ``torch.compile`` is to see plain PyTorch. (The environment counts as it was at the trace.)"""
    return (_while_tracing["name"] or os.environ.get("SENET_BACKEND")) == "reference"


def backend_for(u: Tensor, frozen: bool = False, bare: bool = False) -> str:
    """The implementation that a map gets: the named one, or ``"auto"``'s choice by device, type and size.

    ``frozen``: its norm uses running statistics. On a CPU PyTorch's own operations are the faster then
    (``senet bench --mode inference``: se-fast); ``senet.accelerate`` is what makes inference fast.
    ``bare``: there is neither a gate nor a shortcut.

    Raises:
        InputError: the named one is not made for maps of that device or type.
    """
    name = current_backend()
    if u.device.type == "meta":
        return "reference"
    if name == "native" and (u.device.type != "cpu" or u.dtype not in native.TYPES):
        types = ", ".join(native.TYPES.values())
        raise InputError(f"backend 'native' got a {u.dtype} map on {u.device}; it takes {types} on the CPU")
    if name == "triton" and not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise InputError(f"backend 'triton' got a map on {u.device}; it works on CUDA devices")
    if name != "auto":
        return name
    if u.device.type == "cuda":
        return next((n for n in ("triton", "compiled") if _available(n)), "reference")
    if (
        u.device.type == "cpu"
        and not frozen
        and u.numel() >= (SMALLEST_NATIVE_BARE[not u.is_contiguous()] if bare else SMALLEST_NATIVE)
        and u.dtype in native.TYPES
        and _available("native")
    ):
        return "native"
    return "reference"


@functools.cache
def _available(name: str) -> bool:
    reason = why_not(name)
    if reason is not None and name == "native":
        message = f"senet: the fast CPU code is not used: {reason}. SENET_BACKEND=reference says that this is meant"
        warnings.warn(message, stacklevel=2)
    return reason is None


@functools.cache
def sweeps_of(name: str) -> Sweeps:
    """The functions of a backend. ``"reference"`` gives the definitions themselves."""
    homes = {"reference": "definitions", "compiled": "inductor", "native": "native", "triton": "triton"}
    module = importlib.import_module(f"senet.ops.tail.{homes[name]}")
    return Sweeps(module.moments, module.mean, module.affine, module.affine_backward, module.moments_backward)
