"""What a weight file says about its network: JSON that is checked before anything is made of it.

The declarations below are the one place that knows the types; ``check_fields`` holds any JSON values to annotations.
"""

import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig
from senet.text import brief

_DIGITS = 18  # an integer of more is no size, index or count of anything here


class Attached(TypedDict):
    """See ``senet.nn.attachment.described``."""

    config: dict[str, Any]
    gates: dict[str, int]


class TrainedOn(TypedDict):
    """The data of the training, which must not be judged on."""

    data: str
    val_fraction: float


class WeightMetadata(TypedDict, total=False):
    """The entries that this package reads; any other may be anything."""

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
    """The metadata in a JSON text, with every entry of ``WeightMetadata`` of its type.

    Raises:
        InputError: names the file (``label``) and the entry.
    """
    try:
        values = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label}: its metadata are damaged ({error}); save it again") from error
    check_metadata(values, label)
    return values


def check_metadata(values: object, label: object) -> None:
    """Refuse metadata of a wrong type; see ``read_metadata``."""
    if not isinstance(values, dict):
        raise InputError(f"{label}: its metadata are damaged ({brief(values)} is no JSON object); save it again")
    where = f"{label}: its metadata are damaged:"
    check_fields(values, WeightMetadata, where)
    check_fields(values.get("se") or {}, SEConfig, f"{where} se:")
    check_fields((values.get("attached") or {}).get("config", {}), SEConfig, f"{where} attached.config:")


def check_fields(values: Mapping[str, Any], declared: type, where: str) -> None:
    """Hold JSON values to the annotations of a dataclass or ``TypedDict``; absent and unknown names do not matter.

    Raises:
        InputError: ``where``, then the name, the value and what is wanted.
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
    str: "a text",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotation's outermost type, or one of its literals."""
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
    """An integer; infinity for one of more digits than any size here has, which Python refuses without naming it."""
    return int(text) if len(text) <= _DIGITS else math.copysign(math.inf, -1 if text.startswith("-") else 1)
