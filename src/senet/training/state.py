"""``last.ckpt``, the state to resume from: written beside its place and never trusted when it is read."""

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

_REMEDY = "begin the run anew with --overwrite"
# What Lightning saves, and the callbacks without whose state the run would go on silently as another.
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
    """Writes states in the run's folder itself; Lightning's own way goes through ``TMPDIR`` and syncs nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a state, or leave the one that is there."""
        with replacing(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # the writer's, about the file's length, when the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def checked_state(path: Path) -> Path | None:
    """Path of a state that loads without running code, None where there is none yet; InputError for any other."""
    if not path.exists():
        return None
    try:
        if not _is_whole(path):  # a zip file, as all that PyTorch has saved for years
            raise InputError(f"{path} is damaged or not a PyTorch file; {_REMEDY}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused, since it is damaged or holds more than tensors and loading it could run code; {_REMEDY}"
        ) from None
    except Exception as error:  # bytes of any kind may have been put in the place of ours
        if "not enough memory" in str(error):  # no part is larger than the file, so it is this machine's
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
    """Make an InputError of what fails until ``is_restored()`` because the state does not hold what it should."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        is_other = isinstance(error, RuntimeError) and "loading state_dict" not in str(error)  # a device's, a loader's
        if path is None or is_restored() or is_other or isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or of another version ({first_line(error)}); {_REMEDY}") from None


def _is_whole(path: Path) -> bool:
    """Whether it is a zip file whose parts are there, as they were written; no part is believed to be larger."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        if sum(part.file_size for part in archive.infolist()) > size:
            return False
        return archive.testzip() is None
