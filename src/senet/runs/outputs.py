"""Output folders: what of ours is in them, and how they are taken without losing anything of the user's."""

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
    """What a command leaves in its output folder: glob patterns of all its files, and the file by which it is known."""

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
    """Whether ``folder`` holds something of ours to resume; changes nothing.

    A folder that a killed command had only begun, without its marker yet, may be begun again.

    Args:
        folder: the output that the user names.
        kind: of folder.
        resume: continuing what is there is allowed.
        overwrite: replacing what is there is allowed, if it is ours.

    Raises:
        InputError: the folder has content that must not be touched, or another process is at work there.
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
        raise InputError(f"{folder} exists already; continue it with --resume, or replace it with --overwrite")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents) or folder.is_symlink():
        raise InputError(f"{folder} is the working folder or a link and will not be removed; give another --output")
    return False


@contextmanager
def taken(
    folder: Path, kind: Kind, examined: Callable[[], bool], resuming: bool, inputs: Mapping[str, str | Path | None]
) -> Iterator[None]:
    """Hold a folder that was ``examined``, as it was then; unless ``resuming``, without our files in it.

    ``inputs`` are options and what they name, which must not lie in a folder that is to be overwritten.
    """
    if not resuming:
        refuse_inside(folder, inputs)
    with locked(folder):
        if examined() != resuming:  # another process was quicker
            raise InputError(f"{folder} has changed meanwhile; look at it and try again")
        _remove_remains(folder)
        if not resuming:
            _renew(folder, kind)
        yield


def tidy(folder: Path) -> None:
    """Remove what a process left that was killed when all was done."""
    if (folder / LOCK).exists():
        with locked(folder):
            _remove_remains(folder)


def refuse_inside(folder: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """InputError where an input of the command lies in a folder that is to be overwritten."""
    home = folder.resolve()
    for option, named in inputs.items():
        if named and Path(named).exists() and Path(named).resolve().is_relative_to(home):
            raise InputError(f"{option} {named} lies in {folder}, which is to be overwritten; give another --output")


def _is_begun(folder: Path, kind: Kind) -> bool:
    """Whether a command of ours was killed while it made the folder: only that leaves a lock, and nothing to lose."""
    there = {path.name for path in folder.iterdir()}
    if there & {RUN.marker, COMPARISON.marker} or not {path.name for path in _own(folder, kind)} <= _FIRST:
        return False
    old = {name for name in there if _is_old_temporary(folder / name)}
    return LOCK in there or (bool(old) and there - old <= _FIRST)


def _renew(folder: Path, kind: Kind) -> None:
    """Remove the files of ours in a folder, so that it can be begun anew; ``examine`` must have allowed it.

    Whatever else is there stays and is named in a warning. The marker goes last: a command that is killed before can
    be repeated.
    """
    runs = [] if kind is RUN else [run for run in folder.glob("runs/*-seed[0-9]*/") if not run.is_symlink()]
    for run in runs:
        refuse_held(run)  # resumed by itself
    for run in runs:
        _remove_remains(run)
    found = [path for path in _own(folder, kind) if path != folder / LOCK]
    for path in found:
        path.unlink()
    homes = {home for path in found for home in path.relative_to(folder).parents} - {Path()}
    for home in sorted(homes, key=lambda home: len(home.parts), reverse=True):
        if any((folder / home).iterdir()):
            if home.parent.name == "runs":
                (folder / home / LOCK).touch()  # with somebody's files in it, it is a folder of ours nevertheless
        else:
            (folder / home).rmdir()
    _name_what_stays(folder)


def _remove_remains(folder: Path) -> None:
    """Remove what killed processes had begun to write in a folder of ours, which must be locked."""
    remove_leftovers(folder)
    for path in folder.iterdir():
        if _is_old_temporary(path):
            path.unlink(missing_ok=True)


def _own(folder: Path, kind: Kind) -> list[Path]:
    """Our files in a folder, the marker last. What lies behind a link is not ours."""
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
    """Whether it is what version 0.1 left when it was killed while it wrote a file of ours."""
    if path.name == f".{CHECKPOINT}.new":
        return True
    known = _OLD_TEMPORARY.fullmatch(path.name)
    if known is None or known["name"] not in (*RUN.files, *COMPARISON.files):
        return False
    return path.lstat().st_mode & 0o777 == 0o600  # as mkstemp makes it
