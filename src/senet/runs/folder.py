"""The files of a run folder: settings, environment, log, results."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from senet._version import __version__
from senet.errors import InputError
from senet.system.atomic import write_atomically
from senet.text import json_text

SETTINGS = "run.json"
RESULT = "result.json"
DATA = "data.json"
CHECKPOINT = "last.ckpt"
_LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "pillow", "simplejpeg")


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, (json_text(values, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, thousands of digits; thousands of brackets
        raise InputError(f"{path} is damaged ({error}); give another folder, or --overwrite to start again") from None


def environment(device: str) -> dict[str, Any]:
    """Everything outside the settings that may affect the results: versions, hardware, threads."""
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


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise the error, so that a full disk ends the run with one line instead of one traceback per log line."""
        error = sys.exception()
        if isinstance(error, OSError):
            error.filename = error.filename or self.baseFilename
        if error is not None:
            raise error


@contextmanager
def log_file() -> Iterator[Callable[[Path], None]]:
    """Buffer the package's log. Call the result with a path to append the buffer and all later lines to that file."""
    logger = logging.getLogger("senet")
    kept = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    kept.setLevel(logging.INFO)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)

    def write_to(path: Path) -> None:
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
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
