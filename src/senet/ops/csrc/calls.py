"""Calls into the C++ library: its arguments, its constants, and its errors as Python exceptions."""

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
    """A constant of the library (constants.hpp)."""
    return _constants()[name]


@functools.cache
def type_number(dtype: torch.dtype) -> int:
    """The library's number for the dtype of a feature map, one of ``TYPES``."""
    return constant(f"type {TYPES[dtype]}")


@functools.lru_cache(1024)
def kept_size(n: int, c: int, hidden: int) -> int:
    """How many numbers the forward pass of a tail saves for the backward pass."""
    function = library().senet_kept
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 3
    return int(function(n, c, hidden))


@functools.cache
def operation(name: str) -> Callable[[bytes], int]:
    """The function of an operation. It takes packed arguments and returns 0, or an error number for ``fail``."""
    function = getattr(library(), f"senet_{name}")
    function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_char_p]
    return function


def fail(error: int) -> NoReturn:
    """Raise an operation's error.

    Raises:
        MemoryError: the workspace could not be allocated.
        RuntimeError: any other error, with the library's message.
    """
    function = library().senet_failure
    function.restype, function.argtypes = ctypes.c_char_p, []
    kind = MemoryError if error == constant("error memory") else RuntimeError
    raise kind(f"senet: the C++ code failed: {function().decode(errors='replace')}")


@functools.cache
def _form(name: str) -> tuple[tuple[str, ...], Callable[..., bytes], Callable[[bytes], int]]:
    """The names of an operation's arguments after those of the feature map, the packer of all, and the operation."""
    structure = OPERATIONS[name]
    return structure.names[len(Map.names) :], structure.pack, operation(name)


def call(name: str, of: Tensor, /, **values: Tensor | float | None) -> None:
    """Run an operation on feature maps with the shape, dtype, and layout of ``of`` (see ``layout.prepared``).

    Args:
        name: name of the operation.
        of: the feature map (N, C, *S), in one of the two layouts.
        values: all fields of the operation's arguments after those of the feature map, in order. Tensors are passed by
            address; tables must be contiguous.
    """
    names, pack, run = _form(name)
    if tuple(values) != names:
        raise TypeError(f"senet: {name} takes {', '.join(names)}, not {', '.join(values)}")
    n, c, *s = of.shape
    last, threads, dtype = not of.is_contiguous(), torch.get_num_threads(), type_number(of.dtype)
    error = run(pack(n, c, math.prod(s), threads, last, dtype, *addresses(values.values())))
    if error:
        fail(error)
