"""Calls of the C++ library: what it is told of a map, its constants, and its errors as Python's exceptions."""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from senet.ops.border import address
from senet.ops.native.arguments import OPERATIONS, Arguments, constants_of
from senet.ops.native.build import library

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
def operation(name: str) -> Callable[[Any], int]:
    """The function of an operation, which takes (a pointer to) its arguments; what it returns is for ``check``."""
    function = getattr(library(), f"senet_{name}")
    function.restype, function.argtypes = ctypes.c_int32, [ctypes.POINTER(OPERATIONS[name])]
    return function


def check(error: int) -> None:
    """Raise what an operation has returned: nothing for 0.

    Raises:
        MemoryError: there was no memory for its working space.
        RuntimeError: anything else, as the library says.
    """
    if not error:
        return
    function = library().senet_failure
    function.restype, function.argtypes = ctypes.c_char_p, []
    kind = MemoryError if error == constant("error memory") else RuntimeError
    raise kind(f"senet: the C++ code failed: {function().decode(errors='replace')}")


def call(name: str, of: Tensor, /, **values: Tensor | Arguments | float | None) -> None:
    """Run an operation on maps like ``of``, which is in one of the two layouts (see ``layout.prepared``).

    All fields of its arguments but the map's are given; tensors are handed over as their addresses. Tables are
    contiguous.
    """
    structure = OPERATIONS[name]
    if len(values) != len(structure._fields_) - 1:  # a missing one would be a null pointer
        raise TypeError(f"senet: {name} takes {len(structure._fields_) - 1} arguments, not {len(values)}")
    for key, x in values.items():
        if isinstance(x, Tensor):
            values[key] = address(x)
    n, c, *s = of.shape
    arguments = structure(
        n=n,
        c=c,
        s=math.prod(s),
        threads=torch.get_num_threads(),
        last=not of.is_contiguous(),
        type=type_number(of.dtype),
        **values,
    )
    check(operation(name)(arguments))
