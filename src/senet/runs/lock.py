"""One command at a time in an output folder.

The lock is the kernel's (``flock``), so it ends with its process, however that ends; the file only says who holds it.
On a network file system it holds between machines where the server supports locks, as NFS usually does; where it does
not, a warning says so and the command goes on without.
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
    """Hold a folder, which is made if it is not there; InputError names the process that holds it already."""
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _take(folder)
    _held[handle] = folder.resolve()
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held, so that it is nobody else's
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written
        del _held[handle]
        os.close(handle)


def refuse_held(folder: Path) -> None:
    """InputError where another living process holds the folder; changes nothing."""
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
        pass  # no locks here: ``locked`` says so
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
            time.sleep(0.02)  # it may be another's ``refuse_held``, which takes no time
            continue
        except OSError as reason:
            _LOG.warning("%s cannot be locked (%s); let no other command write there", folder, reason.strerror)
        if _is_still(handle, path):
            break
        os.close(handle)  # its holder has removed it meanwhile
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
        who = "another process"  # that has only just taken it
    return InputError(f"{folder} is in use by {who}; wait for its end, or give another --output")


def _let_go_in_child() -> None:
    """A loader's process that outlives a killed run must not hold its folder."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
