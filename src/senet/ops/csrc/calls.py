"""Calls of the C++ library: what it is told of a map, its constants, and its errors as Python's exceptions."""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from senet.ops.border import addresses
from senet.ops.csrc.arguments import OPERATIONS, Map, constants_of
from senet.ops.csrc.build import library

TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


@functools.cache
def _constants() -> dict[str, int]:
    return constants_of(library())


def constant(name: str) -> int:
    """A number that the library tells (constants.hpp)."""
    return _constants()[name]


@functools.cache
def type_number(dtype: torch.dtype) -> int:
    """The library's number of a map's type, one of ``TYPES``."""
    return constant(f"type {TYPES[dtype]}")


@functools.lru_cache(1024)
def kept_size(n: int, c: int, hidden: int) -> int:
    """How many numbers a tail's forward pass keeps for its backward pass."""
    function = library().senet_kept
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 3
    return int(function(n, c, hidden))


@functools.cache
def operation(name: str) -> Callable[[bytes], int]:
    """The function of an operation, which takes its packed arguments; what it returns, if not 0, is for ``fail``."""
    function = getattr(library(), f"senet_{name}")
    function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_char_p]
    return function


def fail(error: int) -> NoReturn:
    """Raise an operation's error.

    Raises:
        MemoryError: there was no memory for its working space.
        RuntimeError: anything else, as the library says.
    """
    function = library().senet_failure
    function.restype, function.argtypes = ctypes.c_char_p, []
    kind = MemoryError if error == constant("error memory") else RuntimeError
    raise kind(f"senet: the C++ code failed: {function().decode(errors='replace')}")


@functools.cache
def _form(name: str) -> tuple[tuple[str, ...], Callable[..., bytes], Callable[[bytes], int]]:
    """The names of an operation's arguments behind those of the map, what packs them all, and the operation."""
    structure = OPERATIONS[name]
    return structure.names[len(Map.names) :], structure.pack, operation(name)


def call(name: str, of: Tensor, /, **values: Tensor | float | None) -> None:
    """Run an operation on maps like ``of``, which is in one of the two layouts (see ``layout.prepared``).

    All fields of its arguments but the map's are given, in order; tensors are handed over as their addresses. Tables
    are contiguous.
    """
    names, pack, run = _form(name)
    if tuple(values) != names:
        raise TypeError(f"senet: {name} takes {', '.join(names)}, not {', '.join(values)}")
    n, c, *s = of.shape
    last, threads, dtype = not of.is_contiguous(), torch.get_num_threads(), type_number(of.dtype)
    error = run(pack(n, c, math.prod(s), threads, last, dtype, *addresses(values.values())))
    if error:
        fail(error)
