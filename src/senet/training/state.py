"""``last.ckpt``, the state to resume from. It is written atomically and never trusted when it is read."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from senet.errors import InputError
from senet.system.atomic import replacing
from senet.text import first_line

_REMEDY = "start the run again with --overwrite"
# Entries that Lightning saves, and the callbacks without whose state the run would silently continue differently.
_PARTS = {
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
_CALLBACKS = ("Recorder", "StateSaver")


class StateFile(TorchCheckpointIO):
    """Writes states directly into the run folder. Lightning itself goes through ``TMPDIR`` and does not sync."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a state. If that fails, the existing one is kept."""
        with replacing(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # the writer's, about the file's length, if the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def checked_state(path: Path) -> Path | None:
    """The path if the state there loads without running code, None if there is no state yet, or else InputError."""
    if not path.exists():
        return None
    try:
        if not _is_whole(path):  # PyTorch saves zip files
            raise InputError(f"{path} is damaged or not a PyTorch file; {_REMEDY}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused, since it is damaged or has more than tensors, so loading it could run code; {_REMEDY}"
        ) from None
    except Exception as error:  # the file may have been replaced by anything
        if "not enough memory" in str(error):  # no entry is larger than the file, so this machine is short of memory
            raise
        raise InputError(f"{path} is damaged ({first_line(error)}); {_REMEDY}") from None
    for name, kind in _PARTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise InputError(f"{path} is not the state of a run ({name} is missing or damaged); {_REMEDY}")
    for name in _CALLBACKS:
        if name not in state["callbacks"]:
            raise InputError(f"{path} is not the state of a run (it has no state of {name}); {_REMEDY}")
    return path


@contextmanager
def restoring(path: Path | None, is_restored: Callable[[], bool]) -> Iterator[None]:
    """Turn errors caused by a bad state into InputError, until ``is_restored()``."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        is_other = isinstance(error, RuntimeError) and "loading state_dict" not in str(
            error
        )  # from a device or a loader
        if path is None or is_restored() or is_other or isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or from another version ({first_line(error)}); {_REMEDY}") from None


def _is_whole(path: Path) -> bool:
    """Whether the file is an undamaged zip file. Entries that claim to be larger than the file count as damage."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        if sum(part.file_size for part in archive.infolist()) > size:
            return False
        return archive.testzip() is None
