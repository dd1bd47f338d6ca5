"""The cache folder, for what can be recreated: compiled code and downloaded weights."""

import os
import stat
import tempfile
from pathlib import Path

from platformdirs import user_cache_dir

from senet.errors import InputError


def cache_folder() -> Path:
    """``SENET_CACHE``, or else ``senet`` in the system's cache folder for the user (``XDG_CACHE_HOME`` on Linux).

    Without a writable home, it is a private folder in the system's folder for temporary files.

    Raises:
        InputError: the private folder belongs to another user.
    """
    own = os.environ.get("SENET_CACHE")
    if own:
        return Path(own)
    try:
        usual = Path(user_cache_dir("senet", appauthor=False))
    except RuntimeError:  # no HOME, and the system does not know the user
        return _temporary_folder()
    there = next((folder for folder in (usual, *usual.parents) if os.path.exists(folder)), Path())
    can_be_made = usual.is_absolute() and (there == usual or (there.is_dir() and os.access(there, os.W_OK)))
    return usual if can_be_made else _temporary_folder()


def _temporary_folder() -> Path:
    """A folder that only this user can write to; otherwise, another user could plant a library to be loaded."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir(), f"senet-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise InputError(f"cannot create a cache folder: {error}; set SENET_CACHE to a writable folder") from error
    if not stat.S_ISDIR(state.st_mode) or (os.name == "posix" and (state.st_uid != user or state.st_mode & 0o022)):
        raise InputError(f"{folder} is not private to this user: set SENET_CACHE to a folder of your own")
    return folder
