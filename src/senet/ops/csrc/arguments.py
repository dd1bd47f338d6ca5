"""The arguments of the C++ library's operations: these structures mirror arguments.hpp field by field.

C++ constants and the sizes of the structures are read from the library (constants.hpp). A library with different
structures is rejected when it is loaded. This file needs only Python's standard library.
"""

import ctypes
import struct
from collections.abc import Callable
from typing import Any

_Field = tuple[str, Any]


def _pointers(names: str) -> tuple[_Field, ...]:
    return tuple((name, ctypes.c_void_p) for name in names.split())


def _ints(names: str) -> tuple[_Field, ...]:
    return tuple((name, ctypes.c_int64) for name in names.split())


class Arguments(ctypes.Structure):
    """A structure of the library. Nested C++ structures are flattened here; the memory layout is the same.

    Attributes:
        names: names of the fields, in order.
        pack: packs the values of the fields into bytes, with 0 for a null pointer. Four times as fast as setting the
            fields through ctypes.
    """

    __slots__ = ()
    names: tuple[str, ...]
    pack: Callable[..., bytes]


CODES: dict[Any, str] = {ctypes.c_int64: "q", ctypes.c_double: "d", ctypes.c_float: "f", ctypes.c_void_p: "P"}


def _structure(name: str, *fields: _Field) -> type[Arguments]:
    names = tuple(field for field, _ in fields)
    packer = struct.Struct("".join(CODES[kind] for _, kind in fields))
    return type(name, (Arguments,), {"__slots__": (), "_fields_": fields, "names": names, "pack": packer.pack})


_MAP = _ints("n c s threads last type")
_EXCITATION = (*_ints("hidden gate activation"), *_pointers("w1 b1 w2 b2"))


def _norm(of: str = "") -> tuple[_Field, ...]:
    return (
        *_pointers(f"{of}weight {of}bias"),
        (f"{of}eps", ctypes.c_double),
        (f"{of}momentum", ctypes.c_double),
        *_pointers(f"{of}running_mean {of}running_var"),
    )


Map = _structure("Map", *_MAP)
Excitation = _structure("Excitation", *_EXCITATION)
Norm = _structure("Norm", *_norm())
Convolution = _structure(
    "Convolution",
    *_ints("n c h w out out_h out_w kernel stride pad dilation threads winograd"),
    *_pointers("weight bias"),
    ("low", ctypes.c_float),
    ("high", ctypes.c_float),
)
Step = _structure("Step", *_pointers("convolution gate"), *_ints("relu x x_at id id_at y y_at"))

Moments = _structure("Moments", *_MAP, *_pointers("u mean from_pivot variance"))
Mean = _structure("Mean", *_MAP, *_pointers("u mean"))
Affine = _structure("Affine", *_MAP, *_pointers("u m a b shortcut"), *_ints("relu"), *_pointers("out"))
AffineBackward = _structure("AffineBackward", *_MAP, *_pointers("dout out u m g da db"))
MomentsBackward = _structure("MomentsBackward", *_MAP, *_pointers("g u m a offset slope du"))
Gate = _structure("Gate", *_MAP, *_pointers("h"), *_ints("out"), *_EXCITATION, *_pointers("values"))
GatedSum = _structure("GatedSum", *_MAP, *_pointers("u gate shortcut"), *_ints("relu"))
Tail = _structure(
    "Tail",
    *_MAP,
    *_pointers("u"),
    *_norm("norm_"),
    *_EXCITATION,
    *_pointers("shortcut"),
    *_norm("shortcut_norm_"),
    *_ints("relu"),
    *_pointers("kept shortcut_kept out signs"),
)
TailBackward = _structure(
    "TailBackward",
    *_MAP,
    *_ints("mask"),
    *_pointers("dout out signs u weight"),
    *_EXCITATION,
    *_pointers("kept shortcut shortcut_weight shortcut_kept"),
    *_pointers("dsum du dshortcut dweight dbias dw1 db1 dw2 db2 shortcut_dweight shortcut_dbias"),
)
Convolve = _structure("Convolve", *_pointers("convolution gate"), *_ints("relu"), *_pointers("x id y"))
Run = _structure("Run", *_pointers("steps"), *_ints("count"), *_pointers("bases"))

# Each operation by its name in the library, without the prefix `senet_`.
OPERATIONS: dict[str, type[Arguments]] = {
    "moments": Moments,
    "mean": Mean,
    "affine": Affine,
    "affine_backward": AffineBackward,
    "moments_backward": MomentsBackward,
    "gate": Gate,
    "gated_sum": GatedSum,
    "tail": Tail,
    "tail_backward": TailBackward,
    "convolve": Convolve,
    "run": Run,
}
STRUCTURES = (Map, Excitation, Norm, Convolution, Step, *OPERATIONS.values())


class _Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def constants_of(library: ctypes.CDLL) -> dict[str, int]:
    """The constants of a loaded library, by name."""
    function = library.senet_constants
    function.restype, function.argtypes = ctypes.POINTER(_Constant), []
    table, constants, index = function(), {}, 0
    while table[index].name is not None:
        constants[table[index].name.decode()] = table[index].value
        index += 1
    return constants


def mismatch(library: ctypes.CDLL) -> str | None:
    """Why a loaded library cannot be called with these structures, or None if it can."""
    if not hasattr(library, "senet_constants"):
        return "it does not report the sizes of its structures"
    constants = constants_of(library)
    for structure in STRUCTURES:
        here, there = ctypes.sizeof(structure), constants.get(f"sizeof {structure.__name__}")
        if here != there:
            return f"its {structure.__name__} has {there} bytes instead of {here}"
    return None
