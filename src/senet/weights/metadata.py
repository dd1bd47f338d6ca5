"""The metadata of weight files: JSON that is validated before anything is built from it.

The declarations below define the types; ``check_fields`` validates JSON values against annotations.
"""

import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief

_DIGITS = 18  # no size, index, or count here has more


class Attached(TypedDict):
    """See ``senet.nn.attachment.described``."""

    config: dict[str, Any]
    gates: dict[str, int]


class TrainedOn(TypedDict):
    """The training data, which must not be used for evaluation."""

    data: str
    val_fraction: float


class WeightMetadata(TypedDict, total=False):
    """The entries that this package reads. Other entries may have any type."""

    model: str
    num_classes: int
    in_chans: int
    se: dict[str, Any] | None
    kwargs: dict[str, Any]
    attached: Attached | None
    folded: dict[str, int] | None
    classes: list[str] | None
    transform: dict[str, Any] | None
    metrics: dict[str, Any] | None
    trained_on: TrainedOn | None
    dataset: str | None
    license: str | None


def read_metadata(text: str, label: object) -> dict[str, Any]:
    """Parse metadata from JSON, and check the types of the entries of ``WeightMetadata``.

    Raises:
        InputError: the JSON is damaged or an entry has the wrong type; names the file (``label``) and the entry.
    """
    try:
        values = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: its metadata are damaged ({error}); save it again") from error
    check_metadata(values, label)
    return values


def check_metadata(values: object, label: object) -> None:
    """Reject metadata with entries of the wrong type; see ``read_metadata``."""
    if not isinstance(values, dict):
        raise InputError(f"{label}: its metadata are damaged ({brief(values)} is not a JSON object); save it again")
    where = f"{label}: its metadata are damaged:"
    check_fields(values, WeightMetadata, where)
    check_fields(values.get("se") or {}, SEConfig, f"{where} se:")
    check_fields((values.get("attached") or {}).get("config", {}), SEConfig, f"{where} attached.config:")


def check_fields(values: Mapping[str, Any], declared: type, where: str) -> None:
    """Check JSON values against the annotations of a dataclass or ``TypedDict``, except missing and unknown names.

    Raises:
        InputError: a type is wrong. The message is ``where``, then the name, the value, and the expected type.
    """
    for name, kind in get_type_hints(declared).items():
        if name in values:
            _check(values[name], kind, name, where)


def _check(value: Any, kind: Any, name: str, where: str) -> None:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return
        kind = next(each for each in inner if each is not types.NoneType)
        _check(value, kind, name, where)
    elif is_typeddict(kind):
        _check(value, dict[str, Any], name, where)
        for key, part in get_type_hints(kind).items():
            _check(value.get(key), part, f"{name}.{key}", where)
    elif not _is_a(value, kind):
        wanted = f"one of {', '.join(map(repr, inner))}" if origin is Literal else _WORDS[origin or kind]
        raise InputError(f"{where} {name} is {brief(value)}; it must be {wanted}")
    elif origin is dict:
        for key, part in value.items():
            _check(part, inner[1], f"{name}[{brief(key)}]", where)
    elif origin in (list, tuple):
        for number, part in enumerate(value):
            _check(part, inner[0], f"{name}[{number}]", where)


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value has the outermost type of an annotation, or is one of its literals."""
    origin = get_origin(kind) or kind
    if origin is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, list | tuple if origin in (list, tuple) else origin)


def _integer(text: str) -> int | float:
    """An integer, or infinity if it has too many digits: ``json`` alone would fail without naming the entry."""
    return int(text) if len(text) <= _DIGITS else math.copysign(math.inf, -1 if text.startswith("-") else 1)
