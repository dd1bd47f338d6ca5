"""Text for people and for files: file names may contain what a terminal or UTF-8 cannot represent.

In a Python string, the bytes of a name that are not UTF-8 are lone surrogates. A path keeps them, so the file can be
opened. Text for people goes through :func:`shown`, and text to be read back through the lossless :func:`json_text`.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

# Bytes that are not UTF-8, control characters (terminal escapes, line breaks), and bidirectional text marks.
_UNPRINTABLE = re.compile("[\ud800-\udfff\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_MOST_ENTRIES, _MOST_CHARACTERS = 3, 60


def shown(name: object) -> str:
    """A name as printable text on one line; U+FFFD replaces what cannot be printed."""
    return _UNPRINTABLE.sub("\ufffd", str(name))


def brief(value: object) -> str:
    """A short description of a value from outside, regardless of its size: as JSON, or else as Python."""
    if isinstance(value, (dict, list, tuple)) and len(value) > _MOST_ENTRIES:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = json.dumps(value[:_MOST_CHARACTERS] if isinstance(value, str) else value, ensure_ascii=False)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "a number with thousands of digits"
    except (TypeError, RecursionError):
        text = reprlib.repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str = "", *, count: int = 1, quote: Callable[[str], str] = repr
) -> str:
    """A question that suggests the known names that start with ``word``, or its close matches; else ``otherwise``."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)] or difflib.get_close_matches(word, known, count)
    return f"did you mean {' or '.join(map(quote, near[:count]))}?" if near else otherwise


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, at most 200 characters, or its class if the message is empty."""
    return str(error).strip().partition("\n")[0].strip()[:200] or type(error).__name__


def json_text(values: Any, **options: Any) -> str:
    """JSON that can be encoded in UTF-8 for any names: lone surrogates become JSON escapes (``\\udce9``).

    ``json.loads`` restores the names exactly. ``options`` are those of ``json.dumps``.
    """
    text = json.dumps(values, ensure_ascii=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()
