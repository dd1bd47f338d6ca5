"""The files below a folder: which are images, and what lies there that is no data."""

import dataclasses
import os
from collections.abc import Callable, Iterable

from PIL import Image

from senet.data.formats import HEAD_BYTES, image_extensions, recognized, stranger

# Files by which a folder that this package has written is known.
OWN_FILES = {
    "run.json": "a run of senet train",
    "compare.json": "a comparison of senet compare",
    "excitations.npz": "a report of senet inspect",
    "fold.json": "a report of senet fold",
    "tax.json": "a report of senet bench",
    ".senet.lock": "what senet is writing",
}
# Folders that systems, network disks and programs make by themselves, in lower case.
_SYSTEM_FOLDERS = {
    "@eadir": "thumbnails of a Synology disk",
    "@recycle": "a network disk's bin",
    "@recently-snapshot": "a network disk's snapshots",
    "#recycle": "a network disk's bin",
    "#snapshot": "a network disk's snapshots",
    "$recycle.bin": "Windows' bin",
    "recycler": "Windows' bin",
    "system volume information": "Windows' own",
    "lost+found": "the file system's own",
    "__macosx": "macOS's metadata from an archive",
    ".ipynb_checkpoints": "copies of Jupyter",
    "__pycache__": "Python's own",
    "lightning_logs": "logs of Lightning",
}


@dataclasses.dataclass
class Found:
    """What lies below a folder: images and other files (paths), and what was left out or not readable (path → why)."""

    images: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)


class Walk:
    """Finds each image once, however links lead: every folder is listed at most once by one ``Walk``.

    Hidden files and folders are passed over. Nothing but regular files is ever opened.
    """

    def __init__(self) -> None:
        self.listed: set[tuple[int, int | str]] = set()

    def mark(self, folder: str | os.PathLike[str]) -> bool:
        """Count a folder as listed; False when it was so before, by this or another path."""
        identity, before = os.stat(folder), len(self.listed)
        # Some network disks number nothing: there, a folder is what its path leads to.
        self.listed.add((identity.st_dev, identity.st_ino or os.path.realpath(folder)))
        return len(self.listed) > before

    def files(self, folder: str | os.PathLike[str], *, chosen: bool = False) -> Found:
        """Search a folder, which the caller has marked, and those below it; paths are sorted.

        A folder that this package has written is left out, unless it is the one that the user has ``chosen``.
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
        """Put one entry of a folder where it belongs."""
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
                    found.left_out[path] = "a link to a folder that is listed already"
            except OSError as error:
                found.unreadable[path] = error.strerror or str(error)
        elif is_file and is_image(path):
            (links if entry.is_symlink() else found.images).append(path)
        elif not is_file and entry.is_symlink() and has_image_extension(path):
            found.images.append(path)  # a broken link: named, and counted as a bad image, when it is loaded
        else:
            found.others.append(path)


def _add_links(found: Found, links: list[str]) -> None:
    """Add linked images, each only where its file is not among the images already."""
    if not links:
        return
    real = {parent: os.path.realpath(parent) for parent in {os.path.dirname(path) for path in found.images}}
    known = {os.path.join(real[os.path.dirname(path)], os.path.basename(path)) for path in found.images}
    for path in sorted(links):
        target = os.path.realpath(path)
        if target in known:
            found.left_out[path] = "a link to an image that is listed already"
        else:
            known.add(target)
            found.images.append(path)


def own_folder(names: Iterable[str]) -> str | None:
    """What wrote a folder that holds these names, where it was this package."""
    return next((f"{OWN_FILES[name]}, for its {name}" for name in names if name in OWN_FILES), None)


def system_folder(name: str) -> str | None:
    """What a folder of this name is, where it is no data of anybody's."""
    return _SYSTEM_FOLDERS.get(name.lower())


def has_image_extension(path: str) -> bool:
    """Whether a file is called an image; it is not opened."""
    return os.path.splitext(path)[1].lower() in image_extensions()


def is_image(path: str) -> bool:
    """Whether a regular file counts as an image: by its extension or, where that says nothing, by how it begins."""
    if has_image_extension(path):
        return True
    if stranger(path) is not None:
        return False
    try:
        with open(path, "rb") as file:
            form = recognized(file.read(HEAD_BYTES))
            if form is not None:
                Image.open(file, formats=[form])  # its header alone: "P5" begins many a text
    except Exception:  # Pillow's plugins raise nearly anything
        return False
    return form is not None


def asked(question: Callable[[], bool]) -> bool:
    """The answer of ``os.DirEntry.is_dir`` or ``is_file``, no where there is none."""
    try:
        return question()
    except OSError:  # of a link that leads to itself, or to where nobody may look
        return False
