"""Atomic files: written completely or not at all.

An unfinished file has a temporary name, ``.senet.<host>.<process>.<token>.tmp``, in the folder of the final file. If
the process is killed, the temporary file stays; the next command that writes into the folder removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.senet\.(?P<host>.+)\.(?P<process>\d+)\.[0-9a-f]{8}\.tmp")
_SECONDS_TO_WRITE = 24 * 3600  # older files do not belong to a running process on any machine
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())[:64] or "unknown"
_being_written: set[Path] = set()
_swept: set[Path] = set()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file such that readers, even after a crash, find the old or the new content, never a part."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which replaces ``path`` durably at the end. An exception leaves ``path`` unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    try:
        # The kernel applies the umask; a process cannot read it without changing it for its other threads.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # "No space left on device" names no file by itself
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _being_written.discard(temporary)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` that is deleted at the end, with its contents."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(parent)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _being_written.discard(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of dead processes from a folder, as far as permissions allow."""
    try:
        with os.scandir(folder) as entries:
            left = [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    except PermissionError:  # a folder that is writable but not readable
        return
    for path in left:
        if _lives(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # belongs to another user, in a shared folder
                path.unlink()


def _temporary(folder: Path) -> Path:
    if folder not in _swept:
        _swept.add(folder)
        remove_leftovers(folder)
    path = folder / f".senet.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    _being_written.add(path)
    return path


def _lives(path: Path) -> bool:
    """Whether the process that writes ``path`` may still be running."""
    known = _TEMPORARY.fullmatch(path.name)
    try:
        if known is None or time.time() - path.lstat().st_mtime > _SECONDS_TO_WRITE:
            return False
        process = int(known["process"])
        if known["host"] != _HOST:
            return True  # cannot be checked from this machine
        if process == os.getpid():  # successive processes of a container may have the same id
            return path in _being_written
        os.kill(process, 0)
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return False
    except PermissionError:
        return True  # belongs to another user
    return True


def _sync_folder(folder: Path) -> None:
    """Flush the new file name to disk, if the file system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
