"""Ctrl-C and SIGTERM: the run finishes the batch at hand, saves, and stops; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop and has saved its state. ``signal`` is the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signal = signum


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked for the end; set by the signal handlers, read between batches."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = int(signal.SIGINT)
        self._listening = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the request. A second Ctrl-C does not wait for the batch."""
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.signal = True, signum

    def take_back(self) -> None:
        """Undo what Lightning puts before our handler of SIGTERM.

        Its own broadcasts to all processes from within the handler, between whatever collectives happen to be under
        way, and mixes them up. ``StateSaver`` lets the processes agree after a batch instead.
        """
        if self._listening:
            for number in _SIGNALS:
                signal.signal(number, self.handle)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over SIGINT and SIGTERM, and give them back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may handle signals; the caller keeps its own way to stop
            return
        previous = {number: signal.signal(number, self.handle) for number in _SIGNALS}
        outer, self._listening = self._listening, True
        try:
            yield self
        finally:
            self._listening = outer
            for number, handler in previous.items():
                signal.signal(number, handler)
