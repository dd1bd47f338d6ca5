"""How a run ends before its time: asked by a signal, or because another of its processes has failed.

Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGUSR1 (SLURM's warning) let it finish the batch at hand, save,
and stop; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from senet.errors import InputError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop and has saved its state. ``signal`` is the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signal = signum


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_GRACE = 5.0  # seconds for a process that has failed to say why


class StopRequest:
    """Whether somebody asked for the end; set by the signal handlers, read between batches."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = int(signal.SIGINT)
        self._listening: list[signal.Signals] = []  # empty: not at the time

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
        for number in self._listening:
            signal.signal(number, self.handle)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over the signals, and give them back afterwards. SIGHUP stays ignored under ``nohup``."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may handle signals; the caller keeps its own way to stop
            return
        taken = [n for n in _SIGNALS if n != getattr(signal, "SIGHUP", None) or signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self.handle) for number in taken}
        outer, self._listening = self._listening, taken
        try:
            yield self
        finally:
            self._listening = outer
            for number, handler in previous.items():
                signal.signal(number, handler)


def end_others(trainer: pl.Trainer, exception: BaseException) -> None:
    """End the processes that Lightning started for the other devices: without this one they would wait forever.

    An error of our own is the reason; any other may be due to one of them, which gets the time to say why.
    """
    processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    if isinstance(exception, (Interrupted, KeyboardInterrupt)):
        return  # they stop by themselves, or Lightning ends them
    until = time.monotonic() + (0 if isinstance(exception, InputError) else _GRACE)
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # in a collective, no other signal reaches it
