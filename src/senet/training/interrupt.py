"""Early ends of a run: a signal asks it to stop, or another of its processes has failed.

After Ctrl-C, SIGTERM, SIGHUP (the terminal was closed), or SIGUSR1 (SLURM's warning), the run finishes the current
batch, saves, and stops. A second Ctrl-C stops it immediately.
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


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved its state. ``signal`` is the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signal = signum


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_GRACE = 5.0  # seconds in which a failed process can report its error


class StopRequest:
    """Whether the run should stop. The signal handlers set it, and the run reads it between batches."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = int(signal.SIGINT)
        self._listening: list[signal.Signals] = []  # empty: not listening

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Record the request. A second Ctrl-C does not wait for the batch to end."""
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.signal = True, signum

    def take_back(self) -> None:
        """Replace Lightning's handler of SIGTERM by ours.

        Lightning's handler broadcasts to all processes immediately, which corrupts collectives in progress.
        ``StateSaver`` lets the processes agree after a batch instead.
        """
        for number in self._listening:
            signal.signal(number, self.handle)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals, and restore their handlers afterwards. Under ``nohup``, SIGHUP stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may handle signals; here, the caller must set the request
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
    """End the processes that Lightning started for the other devices, which would wait for this one forever.

    After an InputError, which is this process's own, they end immediately. Any other error may come from one of them,
    so they get time to report it.
    """
    processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    if isinstance(exception, (Interrupted, KeyboardInterrupt)):
        return  # they stop themselves, or Lightning ends them
    until = time.monotonic() + (0 if isinstance(exception, InputError) else _GRACE)
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # within a collective, no other signal has an effect
