"""Finds the images below a folder, and the files and folders there that are not data."""

import dataclasses
import os
from collections.abc import Callable, Iterable

from PIL import Image

from senet.data.formats import HEAD_BYTES, image_extensions, recognized, stranger

# Files that identify a folder written by this package.
OWN_FILES = {
    "run.json": "a run of senet train",
    "compare.json": "a comparison of senet compare",
    "excitations.npz": "a report of senet inspect",
    "fold.json": "a report of senet fold",
    "tax.json": "a report of senet bench",
    ".senet.lock": "output that senet is writing",
}
# Folders that operating systems, network drives, and programs create, in lower case.
_SYSTEM_FOLDERS = {
    "@eadir": "thumbnails of a Synology drive",
    "@recycle": "recycle bin of a network drive",
    "@recently-snapshot": "snapshots of a network drive",
    "#recycle": "recycle bin of a network drive",
    "#snapshot": "snapshots of a network drive",
    "$recycle.bin": "Windows recycle bin",
    "recycler": "Windows recycle bin",
    "system volume information": "Windows system folder",
    "lost+found": "file system folder",
    "__macosx": "macOS metadata from an archive",
    ".ipynb_checkpoints": "Jupyter checkpoints",
    "__pycache__": "Python cache",
    "lightning_logs": "Lightning logs",
}


@dataclasses.dataclass
class Found:
    """The content of a folder: images and other files (paths), and what was skipped or unreadable (path → reason)."""

    images: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)


class Walk:
    """Finds each image once, even with links: a ``Walk`` lists every folder at most once.

    Hidden files and folders are skipped. Only regular files are opened.
    """

    def __init__(self) -> None:
        self.listed: set[tuple[int, int | str]] = set()

    def mark(self, folder: str | os.PathLike[str]) -> bool:
        """Mark a folder as listed. Returns False if it was marked before, under this or another path."""
        identity, before = os.stat(folder), len(self.listed)
        # Some network drives have no inode numbers; there, the real path identifies a folder.
        self.listed.add((identity.st_dev, identity.st_ino or os.path.realpath(folder)))
        return len(self.listed) > before

    def files(self, folder: str | os.PathLike[str], *, chosen: bool = False) -> Found:
        """Search a folder, which the caller has marked, and its subfolders. Paths are sorted.

        Folders that this package has written are skipped, except ``folder`` itself if the user has ``chosen`` it.
        """
        found, links, waiting = Found(), list[str](), [os.fspath(folder)]
        while waiting:
            parent = waiting.pop()
            try:
                entries = list(os.scandir(parent))
            except OSError as error:
                found.unreadable[parent] = error.strerror or str(error)
                continue
            own = own_folder(entry.name for entry in entries)
            if own is not None and not (chosen and parent == os.fspath(folder)):
                found.left_out[parent] = own
                continue
            for entry in entries:
                self._sort(entry, found, links, waiting)
        _add_links(found, links)
        found.images.sort()
        found.others.sort()
        return found

    def _sort(self, entry: os.DirEntry[str], found: Found, links: list[str], waiting: list[str]) -> None:
        """Sort one entry of a folder into ``found``, ``links``, or ``waiting``."""
        path, system = entry.path, system_folder(entry.name)
        is_folder, is_file = asked(entry.is_dir), asked(entry.is_file)
        if is_folder and system is not None:
            found.left_out[path] = system
        elif entry.name.startswith("."):
            return
        elif is_folder:
            try:
                if self.mark(path):
                    waiting.append(path)
                else:
                    found.left_out[path] = "a link to a folder that is already listed"
            except OSError as error:
                found.unreadable[path] = error.strerror or str(error)
        elif is_file and is_image(path):
            (links if entry.is_symlink() else found.images).append(path)
        elif not is_file and entry.is_symlink() and has_image_extension(path):
            found.images.append(path)  # a broken link: reported as a bad image when it is loaded
        else:
            found.others.append(path)


def _add_links(found: Found, links: list[str]) -> None:
    """Add linked images whose files are not among the images yet."""
    if not links:
        return
    real = {parent: os.path.realpath(parent) for parent in {os.path.dirname(path) for path in found.images}}
    known = {os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in found.images}
    for path in sorted(links):
        target = os.path.realpath(path)
        if target in known:
            found.left_out[path] = "a link to an image that is already listed"
        else:
            known.add(target)
            found.images.append(path)


def own_folder(names: Iterable[str]) -> str | None:
    """The kind of output in a folder with these files, or None if this package did not write it."""
    return next((f"{OWN_FILES[name]}, as it has {name}" for name in names if name in OWN_FILES), None)


def system_folder(name: str) -> str | None:
    """A description of a system folder with this name, or None if it may be data."""
    return _SYSTEM_FOLDERS.get(name.lower())


def has_image_extension(path: str) -> bool:
    """Whether a file has the extension of an image. It is not opened."""
    return os.path.splitext(path)[1].lower() in image_extensions()


def is_image(path: str) -> bool:
    """Whether a regular file counts as an image, by its extension or, if that is unknown, by its first bytes."""
    if has_image_extension(path):
        return True
    if stranger(path) is not None:
        return False
    try:
        with open(path, "rb") as file:
            form = recognized(file.read(HEAD_BYTES))
            if form is not None:
                Image.open(file, formats=[form])  # reads the header, as many a text starts with "P5"
    except Exception:  # Pillow's plugins raise almost any exception
        return False
    return form is not None


def asked(question: Callable[[], bool]) -> bool:
    """The result of ``os.DirEntry.is_dir`` or ``is_file``, or False if it fails."""
    try:
        return question()
    except OSError:  # a link to itself, or to a place without permission
        return False
