"""Standard streams that are closed, cannot encode our symbols, or lose their reader."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# ASCII replacements for the symbols that the commands print. rich replaces the frames of its tables itself.
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


class ReaderGone(Exception):  # noqa: N818 - not an error
    """The reader of the output has exited (`| head`). Not an OSError: typer and rich turn those into an exit code."""


@contextmanager
def steady_streams(*, finish: bool) -> Iterator[None]:
    """Make all standard streams open, able to print any text, and robust against the loss of their reader.

    A character that a stream cannot encode becomes an ASCII symbol or ``?``, and so does a byte of a file name that is
    not UTF-8.

    If standard error fails, its text is discarded: a progress bar must not end a run. If standard output loses its
    reader, its text is discarded with ``finish``; otherwise :class:`ReaderGone` ends the command.
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
    """A text stream that discards its text after an error in ``codes`` (None: any), and raises ``then``, if set."""

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
            # This also discards the stream's buffer, which Python flushes at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._then is not None:
            raise self._then from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_closed_streams() -> None:
    """Replace closed standard streams (`>&-`) by the null device, or the next opened file would take their number."""
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
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in text), error.end
