"""A lock on an output folder: only one command at a time may write there.

The kernel holds the lock (``flock``), so it always ends with its process. The file only tells who holds it. On a
network file system, the lock works across machines if the server supports locks, as NFS usually does. Otherwise, the
command logs a warning and continues without a lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from senet.errors import InputError

LOCK = ".senet.lock"
_LOG = logging.getLogger("senet.runs")
_held: dict[int, Path] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, which is created if needed. If a process holds it already, raises InputError with its name."""
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _take(folder)
    _held[handle] = folder.resolve()
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while we hold it, so that it is not another's
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written
        del _held[handle]
        os.close(handle)


def refuse_held(folder: Path) -> None:
    """Raise InputError if another living process holds the folder. Changes nothing."""
    if folder.resolve() in _held.values():
        return
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, handle) from None
    except OSError:
        pass  # no locks on this file system; ``locked`` warns about it
    finally:
        os.close(handle)


def _take(folder: Path) -> int:
    path = folder / LOCK
    patience = 10
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = _in_use(folder, handle)
            os.close(handle)
            patience -= 1
            if not patience:
                raise error from None
            time.sleep(0.02)  # it may be the ``refuse_held`` of another process, which is short
            continue
        except OSError as reason:
            _LOG.warning(
                "%s cannot be locked (%s); make sure that no other command writes there", folder, reason.strerror
            )
        if _is_still(handle, path):
            break
        os.close(handle)  # the previous holder has removed the file
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return handle


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _in_use(folder: Path, handle: int) -> InputError:
    try:
        holder = json.loads(os.pread(handle, 1000, 0))
        who = f"process {holder['process']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"  # which has just taken the lock
    return InputError(f"{folder} is in use by {who}; wait until it ends, or give another --output")


def _let_go_in_child() -> None:
    """Release the folders, as a loader process that outlives a killed run must not hold its folder."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
