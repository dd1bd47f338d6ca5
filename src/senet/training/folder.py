"""The folder of one run: its settings, its environment, its log, its results; never overwritten by accident."""

from __future__ import annotations

import json
import logging
import os
import pickle
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from senet._version import __version__
from senet.errors import InputError
from senet.models.weights import write_atomically

SETTINGS = "run.json"
RESULT = "result.json"
DATA = "data.json"
CHECKPOINT = "last.ckpt"
_LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "pillow", "simplejpeg")


def write_json(path: Path, values: Any) -> None:
    """Write JSON for people and programs, atomically."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # a name that is no UTF-8: JSON's own escapes


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is the user's to know about."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, thousands of digits; thousands of brackets
        raise InputError(f"{path} is damaged ({error}); give another folder, or --overwrite to begin anew") from None


def examine(folder: Path, marker: str, *, resume: bool, overwrite: bool) -> bool:
    """Whether ``folder`` holds something of ours to resume; changes nothing.

    Args:
        folder: the output that the user names.
        marker: the file by which a folder of ours is known.
        resume: continuing what is there is allowed.
        overwrite: replacing what is there is allowed, if it is ours.

    Raises:
        InputError: the folder has content that must not be touched.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as --output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / marker).is_file():
        raise InputError(f"{folder} has files that are not from this command; give another --output")
    if resume:
        return True
    if not overwrite:
        raise InputError(f"{folder} exists already; continue it with --resume, or replace it with --overwrite")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents) or folder.is_symlink():
        raise InputError(f"{folder} is the working folder or a link and will not be removed; give another --output")
    return False


def renew(folder: Path) -> None:
    """Make an empty folder; what is there goes, so ``examine`` must have allowed it."""
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def environment(device: str) -> dict[str, Any]:
    """What a number from this run may depend on."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "senet": __version__,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "command": sys.argv,
    }


def checked_state(path: Path) -> Path | None:
    """Path of a state that loads without running code, None where there is none yet; InputError for any other."""
    import torch

    if not path.exists():
        return None
    if not zipfile.is_zipfile(path):  # as all that PyTorch has saved for years
        raise InputError(f"{path} is damaged or not a PyTorch file; begin the run anew with --overwrite")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused, since it is damaged or holds more than tensors and loading it could run code; "
            "begin the run anew with --overwrite"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason}); begin the run anew with --overwrite") from None
    if not isinstance(state, dict) or not {"state_dict", "loops", "callbacks"} <= set(state):
        raise InputError(f"{path} is not the state of a run; begin the run anew with --overwrite")
    return path


@contextmanager
def log_file() -> Iterator[Callable[[Path], None]]:
    """Keep what the package logs; called with a path, it is appended to that file, with all that follows."""
    logger = logging.getLogger("senet")
    kept = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    kept.setLevel(logging.INFO)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)

    def write_to(path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        kept.setTarget(file)
        kept.flush()
        kept.capacity = 1

    try:
        yield write_to
    finally:
        logger.removeHandler(kept)
        file = kept.target
        kept.close()
        if file is not None:
            file.close()
        logger.setLevel(before)
