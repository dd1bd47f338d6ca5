"""Output folders: which files in them are ours, and how a command takes over a folder without losing user files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from senet.errors import InputError
from senet.runs.folder import CHECKPOINT, DATA, RESULT, SETTINGS
from senet.runs.lock import LOCK, locked, refuse_held
from senet.system.atomic import remove_leftovers

_LOG = logging.getLogger("senet.runs")
_OLD_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}")


@dataclass(frozen=True)
class Kind:
    """The output of a command: glob patterns of all its files, and the marker file that identifies its folder."""

    marker: str
    files: tuple[str, ...]


_RUN_FILES = (
    *("recipe.yaml", "environment.json", "log.txt", "curves.csv", "curves.png", DATA, RESULT),
    *("best.safetensors", "last.safetensors", CHECKPOINT, "hpc_ckpt_*.ckpt"),
    *("tensorboard/events.out.tfevents.*", "tensorboard/hparams.yaml"),
    *("steps/version_*/metrics.csv", "steps/version_*/hparams.yaml", LOCK),
)
RUN = Kind(SETTINGS, (*_RUN_FILES, SETTINGS))
COMPARISON = Kind(
    "compare.json",
    (
        *("results.json", "results.csv", "curves.png", LOCK),
        *(f"runs/*-seed[0-9]*/{name}" for name in RUN.files),
        "compare.json",
    ),
)
_FIRST = {LOCK, "recipe.yaml", "data.json"}  # written before the marker


def examine(folder: Path, kind: Kind, *, resume: bool, overwrite: bool) -> bool:
    """Whether ``folder`` has an output of ours to resume. Changes nothing.

    A folder that a killed command left before it wrote the marker may be used again.

    Args:
        folder: The output folder that the user names.
        kind: The kind of output.
        resume: Whether an existing output may be continued.
        overwrite: Whether an existing output of ours may be replaced.

    Raises:
        InputError: The folder has content that must not be touched, or another process is using it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as --output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    refuse_held(folder)  # by another process
    if not (folder / kind.marker).is_file():
        if _is_begun(folder, kind):
            return False
        raise InputError(f"{folder} has files that are not from this command; give another --output")
    if resume:
        return True
    if not overwrite:
        raise InputError(f"{folder} already exists; continue it with --resume, or replace it with --overwrite")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents) or folder.is_symlink():
        raise InputError(f"{folder} is the working directory or a link and will not be removed; give another --output")
    return False


@contextmanager
def taken(
    folder: Path, kind: Kind, examined: Callable[[], bool], resuming: bool, inputs: Mapping[str, str | Path | None]
) -> Iterator[None]:
    """Lock a folder that was ``examined`` and has not changed since. Unless ``resuming``, our files in it are removed.

    ``inputs`` maps options to the paths that they name, which must not be in a folder that will be overwritten.
    """
    if not resuming:
        refuse_inside(folder, inputs)
    with locked(folder):
        if examined() != resuming:  # another process was faster
            raise InputError(f"{folder} has changed in the meantime; look at it and try again")
        _remove_remains(folder)
        if not resuming:
            _renew(folder, kind)
        yield


def tidy(folder: Path) -> None:
    """Remove leftovers of a process that was killed after it had finished its work."""
    if (folder / LOCK).exists():
        with locked(folder):
            _remove_remains(folder)


def refuse_inside(folder: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Raise InputError if an input of the command is in a folder that will be overwritten."""
    home = folder.resolve()
    for option, named in inputs.items():
        if named and Path(named).exists() and Path(named).resolve().is_relative_to(home):
            raise InputError(f"{option} {named} is in {folder}, which would be overwritten; give another --output")


def _is_begun(folder: Path, kind: Kind) -> bool:
    """Whether a command of ours was killed while it created the folder, which leaves a lock and nothing of value."""
    there = {path.name for path in folder.iterdir()}
    if there & {RUN.marker, COMPARISON.marker} or not {path.name for path in _own(folder, kind)} <= _FIRST:
        return False
    old = {name for name in there if _is_old_temporary(folder / name)}
    return LOCK in there or (bool(old) and there - old <= _FIRST)


def _renew(folder: Path, kind: Kind) -> None:
    """Remove our files from a folder, so that it can be used again. ``examine`` must have allowed it.

    All other files are kept, and a warning lists them. The marker is removed last, so that a command that is killed
    before can be repeated.
    """
    runs = [] if kind is RUN else [run for run in folder.glob("runs/*-seed[0-9]*/") if not run.is_symlink()]
    for run in runs:
        refuse_held(run)  # if it is being resumed separately
    for run in runs:
        _remove_remains(run)
    found = [path for path in _own(folder, kind) if path != folder / LOCK]
    for path in found:
        path.unlink()
    homes = {home for path in found for home in path.relative_to(folder).parents} - {Path()}
    for home in sorted(homes, key=lambda home: len(home.parts), reverse=True):
        if any((folder / home).iterdir()):
            if home.parent.name == "runs":
                (folder / home / LOCK).touch()  # it has other files, but it is still our folder
        else:
            (folder / home).rmdir()
    _name_what_stays(folder)


def _remove_remains(folder: Path) -> None:
    """Remove incomplete files of killed processes from a folder of ours, which must be locked."""
    remove_leftovers(folder)
    for path in folder.iterdir():
        if _is_old_temporary(path):
            path.unlink(missing_ok=True)


def _own(folder: Path, kind: Kind) -> list[Path]:
    """Our files in a folder, with the marker last. Files behind a link are not ours."""
    found = [path for pattern in kind.files for path in folder.glob(pattern) if path.is_symlink() or path.is_file()]
    return [path for path in found if not any(home.is_symlink() for home in _between(folder, path))]


def _between(folder: Path, path: Path) -> list[Path]:
    return [folder / home for home in path.relative_to(folder).parents if home != Path()]


def _name_what_stays(folder: Path) -> None:
    files: list[str] = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        files += [str((Path(place) / name).relative_to(folder)) for name in (*names, *links) if name != LOCK]
    if files:
        few = ", ".join(sorted(files)[:3]) + (", …" if len(files) > 3 else "")
        kept = "1 file that is" if len(files) == 1 else f"{len(files)} files that are"
        _LOG.warning("%s: kept %s not from this command: %s", folder, kept, few)


def _is_old_temporary(path: Path) -> bool:
    """Whether this is a temporary file that version 0.1 left when it was killed while writing one of our files."""
    if path.name == f".{CHECKPOINT}.new":
        return True
    known = _OLD_TEMPORARY.fullmatch(path.name)
    if known is None or known["name"] not in (*RUN.files, *COMPARISON.files):
        return False
    return path.lstat().st_mode & 0o777 == 0o600  # as mkstemp makes it
