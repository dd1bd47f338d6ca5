"""Names for people and for files: a file system allows in a name what a terminal or a UTF-8 file cannot stand.

Bytes of a name that are no UTF-8 are lone surrogates in Python's text. A path keeps them, so that the file opens; what
a person reads goes through :func:`shown`; what is read again goes through :func:`json_text`, which loses nothing.
"""

import json
import re
from typing import Any

# Bytes that were no UTF-8, control characters (terminal escapes, line breaks), and marks that turn the writing around.
_UNPRINTABLE = re.compile("[\ud800-\udfff\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def shown(name: object) -> str:
    """A name as a person may read it, on one line: what cannot be shown is replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(name))


def json_text(values: Any, **options: Any) -> str:
    """JSON that UTF-8 can hold, whatever the names in it: lone surrogates become JSON's own escapes (``\\udce9``).

    ``json.loads`` gives the very same names back. ``options`` are those of ``json.dumps``.
    """
    text = json.dumps(values, ensure_ascii=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()
