"""Where the package keeps what it can make or fetch again: compiled code, downloaded weights."""

import os
import stat
import tempfile
from pathlib import Path

from platformdirs import user_cache_dir

from senet.errors import InputError


def cache_folder() -> Path:
    """``SENET_CACHE``, else ``senet`` in the user's cache folder, as the system has it (``XDG_CACHE_HOME`` on Linux).

    A user without a home that can be written to gets a folder of their own among the temporary files.

    Raises:
        InputError: that folder belongs to somebody else.
    """
    own = os.environ.get("SENET_CACHE")
    if own:
        return Path(own)
    try:
        usual = Path(user_cache_dir("senet", appauthor=False))
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return _temporary_folder()
    there = next((folder for folder in (usual, *usual.parents) if os.path.exists(folder)), Path())
    can_be_made = usual.is_absolute() and (there == usual or (there.is_dir() and os.access(there, os.W_OK)))
    return usual if can_be_made else _temporary_folder()


def _temporary_folder() -> Path:
    """A folder for this user alone: nobody else may put a library there, which would then be run."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"senet-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise InputError(f"there is no folder for compiled code: {error}; set SENET_CACHE") from error
    if not stat.S_ISDIR(state.st_mode) or (os.name == "posix" and (state.st_uid != user or state.st_mode & 0o022)):
        raise InputError(f"{folder} is not this user's own folder: set SENET_CACHE to one that is")
    return folder
