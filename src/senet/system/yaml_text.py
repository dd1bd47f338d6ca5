"""YAML without surprises: the reader and the writer for the whole package.

PyYAML reads YAML 1.1, where ``1e-2`` is text, ``no`` is false, ``010`` is 8, and ``1:30`` is 90, and where the last of
several duplicate keys wins silently. This module reads the core schema of YAML 1.2, and rejects duplicate keys.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from senet.errors import InputError

_TAG = "tag:yaml.org,2002:"
_MAX_DIGITS = 400  # beyond the range of float64; Python does not parse or print more than 4300
_CORE = (  # (type, pattern, first characters); the patterns of the core schema, and the merge key of YAML 1.1
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("merge", r"<<", ("<",)),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - as the base class has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"duplicate key {key.value[:80]!r}", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                problem=f"a number with {len(text)} digits", problem_mark=node.start_mark
            )
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(re.sub(r"\.(?=inf|nan)", "", text))


class _Dumper(yaml.SafeDumper):
    """Also quotes text that only one of YAML 1.1 and 1.2 would read as a number."""


for _type, _pattern, _first in _CORE:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{_TAG}{_type}", re.compile(f"^(?:{_pattern})\\Z"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_float)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Invalid YAML raises an InputError whose message starts with ``where``."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{where} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML raises Python's own errors if a value does not match its tag: !!int x, !!timestamp y.
        raise InputError(f"{where} is not valid YAML: {_reason(error)}") from None


def write(values: Any) -> str:
    """YAML that :func:`parse`, and readers of YAML 1.1, read back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _reason(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())[:200]
    return f"line {mark.line + 1}: {problem}"
