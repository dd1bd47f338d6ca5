"""Consoles of the commands: tables go to standard output, progress to standard error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from senet.text import shown

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
_UNLIMITED = 10_000  # columns; a table uses only as many as it needs


def to_output() -> Console:
    """Standard output, as wide as the terminal or ``COLUMNS``. In a file or a pipe, no name is truncated."""
    console = _console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    return console


def to_errors() -> Console:
    """Standard error, which shows progress."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    from rich.console import Console
    from rich.text import Text

    class Printable(Console):
        """Prints file and class names literally: no terminal escape and no ``:cat:`` is interpreted."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str("\n".join(map(shown, text.split("\n"))), **options)

    return Printable(emoji=False, **options)


@contextmanager
def bars(*, elapsed: bool = False) -> Iterator[Callable[[str, str, int, int], None]]:
    """Progress bars on a terminal, nothing elsewhere. Call the result with bar, text, done, and total."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = to_errors()
    if not console.is_terminal:  # rich 13 prints an empty line after a disabled bar
        yield lambda bar, text, done, total: None
        return
    clock = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), clock)
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def update(bar: str, text: str, done: int, total: int) -> None:
            if bar not in tasks:
                tasks[bar] = progress.add_task(text, total=total)
            progress.update(tasks[bar], description=text, completed=done, total=total)

        yield update


def counted(things: Iterable[T], text: str) -> Iterable[T]:
    """Iterate over the things, with a progress bar on a terminal."""
    from rich.progress import track

    console = to_errors()
    return track(things, text, console=console, transient=True) if console.is_terminal else things
