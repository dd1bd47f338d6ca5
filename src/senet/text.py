"""Names and values for people and for files: a file system allows in a name what a terminal or UTF-8 cannot stand.

Bytes of a name that are no UTF-8 are lone surrogates in Python's text. A path keeps them, so that the file opens; what
a person reads goes through :func:`shown`; what is read again goes through :func:`json_text`, which loses nothing.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

# Bytes that were no UTF-8, control characters (terminal escapes, line breaks), and marks that turn the writing around.
_UNPRINTABLE = re.compile("[\ud800-\udfff\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_MOST_ENTRIES, _MOST_CHARACTERS = 3, 60


def shown(name: object) -> str:
    """A name as a person may read it, on one line: what cannot be shown is replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(name))


def brief(value: object) -> str:
    """A value from outside in a few words, however large it is: as JSON has it, or else as Python has it."""
    if isinstance(value, (dict, list, tuple)) and len(value) > _MOST_ENTRIES:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = json.dumps(value[:_MOST_CHARACTERS] if isinstance(value, str) else value, ensure_ascii=False)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "a number of thousands of digits"
    except (TypeError, RecursionError):
        text = reprlib.repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str = "", *, count: int = 1, quote: Callable[[str], str] = repr
) -> str:
    """A question that names what is known and begins like ``word``, or is nearest to it; else ``otherwise``."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)] or difflib.get_close_matches(word, known, count)
    return f"did you mean {' or '.join(map(quote, near[:count]))}?" if near else otherwise


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says, of not more than 200 characters; its class where it says nothing."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def json_text(values: Any, **options: Any) -> str:
    """JSON that UTF-8 can hold, whatever the names in it: lone surrogates become JSON's own escapes (``\\udce9``).

    ``json.loads`` gives the very same names back. ``options`` are those of ``json.dumps``.
    """
    text = json.dumps(values, ensure_ascii=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()
