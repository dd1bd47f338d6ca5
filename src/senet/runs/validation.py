"""Validation of external values against dataclasses and pydantic models, with a one-line message for a wrong value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from senet.errors import InputError
from senet.runs import folder as folders
from senet.text import brief

T = TypeVar("T")
# For ``__pydantic_config__`` of a dataclass: an unknown name is an error. The types of the fields define what they
# accept; with ``strict=True``, a number field accepts no booleans and no text.
CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)
_SIDES = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "input should be text")
    return value


# File names may not be UTF-8, which pydantic's own text type requires.
Text = Annotated[str, PlainValidator(_text)]


def checked(kind: type[T], values: Any) -> T:
    """``values`` as a ``kind``. Raises InputError that names the field, but not the file, which the caller knows."""
    adapters: Callable[[Any], TypeAdapter[T]] = _adapter
    try:
        return adapters(kind).validate_python(values)
    except ValidationError as error:
        raise InputError(first_problem(error, kind)) from None


def read(path: Path, kind: type[T], prepare: Callable[[Any], Any] = lambda values: values) -> T:
    """Read a JSON file of ours as a ``kind``, after ``prepare``. Raises InputError that names file and field."""
    values = folders.read_json(path)
    try:
        return checked(kind, prepare(values))
    except InputError as error:
        raise InputError(
            f"{path} is damaged or from another version ({error}); give another folder, or start again with --overwrite"
        ) from None


def first_problem(error: ValidationError, kind: type[Any]) -> str:
    """The first error as one line: the field, the given value, and the allowed values."""
    first = error.errors()[0]
    place = first["loc"]
    own = (
        first.get("ctx", {}).get("error") if first["type"] == "value_error" else None
    )  # raised by a validator of the model
    message = str(own or first["msg"])
    message = message[:1].lower() + message[1:]
    if first["type"] in ("dataclass_type", "model_type", "model_attributes_type"):
        message = "input should be a mapping of names to values"
    said = first["type"] in ("missing", "missing_argument", "value_error")
    given = "" if said else f", got {brief(first['input'])}"
    allowed = bounds(kind, place)
    named = ".".join(map(str, place))
    return f"{named + ': ' if named else ''}{message}{given}{'; allowed: ' + allowed if allowed else ''}"


def bounds(kind: Any, place: Sequence[int | str]) -> str:
    """The allowed range of the number at this place ("at least 1, at most 64"), or "" if there is none."""
    found: dict[str, Any] = {}
    for part in place:
        hints = get_type_hints(kind, include_extras=True) if isinstance(kind, type) and isinstance(part, str) else {}
        if part not in hints:
            return ""
        metadata = [m for hint in (hints[part], *get_args(hints[part])) for m in getattr(hint, "__metadata__", ())]
        if issubclass(kind, BaseModel):
            metadata.append(kind.model_fields[part])
        limits = [limit for field in metadata for limit in getattr(field, "metadata", ())]
        found = {name: getattr(limit, name) for limit in limits for name, _ in _SIDES if hasattr(limit, name)}
        kind = next((k for k in (hints[part], *get_args(hints[part])) if isinstance(k, type)), None)
    return ", ".join(f"{word} {found[name]}" for name, word in _SIDES if name in found)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
