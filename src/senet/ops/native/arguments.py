"""The arguments of the C++ library's operations: Python's twins of the structures in arguments.hpp, field by field.

What has a number in C++ is asked of the library (constants.hpp), the structures' sizes too: a library that was made for
others is refused when it is loaded. This file needs nothing but Python's standard library.
"""

import ctypes
from typing import Any

_Field = tuple[str, Any]


def _pointers(names: str) -> tuple[_Field, ...]:
    return tuple((name, ctypes.c_void_p) for name in names.split())


def _ints(names: str) -> tuple[_Field, ...]:
    return tuple((name, ctypes.c_int64) for name in names.split())


class Arguments(ctypes.Structure):
    """A structure whose fields are set by name; another name than a field's is an error."""

    __slots__ = ()


def _structure(name: str, *fields: _Field) -> type[Arguments]:
    """Fields of a first field ``map`` are set like those of the structure itself."""
    inside = ("map",) if fields[0][0] == "map" else ()
    return type(name, (Arguments,), {"__slots__": (), "_anonymous_": inside, "_fields_": fields})


Map = _structure("Map", *_ints("n c s threads last type"))
_map: _Field = ("map", Map)

Excitation = _structure("Excitation", *_ints("hidden gate activation"), *_pointers("w1 b1 w2 b2"))
Norm = _structure(
    "Norm",
    *_pointers("weight bias"),
    ("eps", ctypes.c_double),
    ("momentum", ctypes.c_double),
    *_pointers("running_mean running_var"),
)
Convolution = _structure(
    "Convolution",
    *_ints("n c h w out out_h out_w kernel stride pad dilation threads winograd"),
    *_pointers("weight bias"),
    ("low", ctypes.c_float),
    ("high", ctypes.c_float),
)
Step = _structure("Step", *_pointers("convolution excitation"), *_ints("relu x x_at id id_at y y_at"))

Moments = _structure("Moments", _map, *_pointers("u mean from_pivot variance"))
Mean = _structure("Mean", _map, *_pointers("u mean"))
Affine = _structure("Affine", _map, *_pointers("u m a b shortcut"), *_ints("relu"), *_pointers("out"))
AffineBackward = _structure("AffineBackward", _map, *_pointers("dout out u m g da db"))
MomentsBackward = _structure("MomentsBackward", _map, *_pointers("g u m a offset slope du"))
Gate = _structure("Gate", _map, *_pointers("h"), *_ints("out"), ("excitation", Excitation), *_pointers("gate"))
GatedSum = _structure("GatedSum", _map, *_pointers("u gate shortcut"), *_ints("relu"))
Tail = _structure(
    "Tail",
    _map,
    *_pointers("u"),
    ("norm", Norm),
    ("excitation", Excitation),
    *_pointers("shortcut"),
    ("shortcut_norm", Norm),
    *_ints("relu"),
    *_pointers("kept shortcut_kept out signs"),
)
TailBackward = _structure(
    "TailBackward",
    _map,
    *_ints("mask"),
    *_pointers("dout out signs u weight"),
    ("excitation", Excitation),
    *_pointers("kept shortcut shortcut_weight shortcut_kept"),
    *_pointers("dsum du dshortcut dweight dbias dw1 db1 dw2 db2 shortcut_dweight shortcut_dbias"),
)
Convolve = _structure("Convolve", *_pointers("convolution excitation"), *_ints("relu"), *_pointers("x id y"))
Run = _structure("Run", *_pointers("steps"), *_ints("count"), *_pointers("bases"))

Constant = _structure("Constant", ("name", ctypes.c_char_p), *_ints("value"))

# Each operation by its name in the library, without `senet_`.
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


def constants_of(library: ctypes.CDLL) -> dict[str, int]:
    """The numbers that a loaded library tells, by name."""
    function = library.senet_constants
    function.restype, function.argtypes = ctypes.POINTER(Constant), []
    table, constants, index = function(), {}, 0
    while table[index].name is not None:
        constants[table[index].name.decode()] = table[index].value
        index += 1
    return constants


def mismatch(library: ctypes.CDLL) -> str | None:
    """Why a loaded library cannot be called with these structures; None if it can."""
    if not hasattr(library, "senet_constants"):
        return "it does not say what its arguments are"
    constants = constants_of(library)
    for structure in STRUCTURES:
        here, there = ctypes.sizeof(structure), constants.get(f"sizeof {structure.__name__}")
        if here != there:
            return f"its {structure.__name__} has {there} bytes, and {here} here"
    return None
