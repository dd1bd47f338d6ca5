"""The standard streams of a command: closed ones, ones that lack our marks, and ones whose reader goes away."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

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
_PLAIN_ERRORS = "senet.plain"
_GONE = (errno.EPIPE, errno.EIO)  # a closed pipe, and a terminal that was closed


class ReaderGone(Exception):  # noqa: N818 - nothing went wrong
    """Nobody reads the output any more (`| head`). No OSError, which typer and rich would turn into an exit code."""


@contextmanager
def steady_streams(*, finish: bool) -> Iterator[None]:
    """Standard streams that are all open, that print any text, and that a reader may leave at any time.

    A character that a stream's encoding lacks becomes a plain mark, or ``?``; so does half a character of a file name
    that is no UTF-8.

    Errors that cannot be shown are dropped: no progress bar is worth a run. An output without a reader is dropped with
    ``finish``, and ends the command with :class:`ReaderGone` without.
    """
    _open_closed_streams()
    codecs.register_error(_PLAIN_ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAIN_ERRORS)
    before = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Steady(sys.stdout, _GONE, None if finish else ReaderGone))
    sys.stderr = cast(TextIO, _Steady(sys.stderr, None, None))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Steady:
    """A text stream that writes into nothing from the first of these errors on (None: of any), or raises ``then``."""

    def __init__(self, stream: TextIO, codes: tuple[int, ...] | None, then: type[Exception] | None) -> None:
        self._stream, self._codes, self._then = stream, codes, then

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._codes is not None and error.errno not in self._codes:
            raise error
        with suppress(OSError, ValueError):
            # What is still in the stream's buffer goes there as well, also when Python flushes it at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._then is not None:
            raise self._then from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Put the null device where a standard stream was closed (`>&-`); else the next file to be opened would be it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere != number:
                os.close(nowhere)
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in text), error.end
