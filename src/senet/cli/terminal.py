"""What the standard streams can show: every text is printed, with plain marks where the encoding has no better ones."""

from __future__ import annotations

import codecs
import io
import sys

# Marks that the commands print, and what stands for them in ASCII. Frames are rich's, which does the same by itself.
_PLAIN = {
    "×": "x",
    "÷": "/",
    "·": "*",
    "±": "+-",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "•": "*",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "²": "^2",
}
_ERRORS = "senet.plain"


def prepare_streams() -> None:
    """Make the standard output and error streams print any text: no name and no mark ends in an encoding error.

    A character that the stream's encoding lacks becomes a plain mark, or ``?``; so does half a character of a file name
    that is no UTF-8.
    """
    codecs.register_error(_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in text), error.end
