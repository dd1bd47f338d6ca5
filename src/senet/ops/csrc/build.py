"""Loads the C++ library: a prebuilt binary from the package, or one that is compiled on this machine.

The library is compiled once, for the processor at hand, and cached for later processes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

from senet.errors import InputError
from senet.ops.csrc import forms
from senet.ops.csrc.arguments import mismatch
from senet.ops.csrc.forms import BuildError, compiler
from senet.system.cache import cache_folder

__all__ = ["BuildError", "compiler", "library", "loaded_from", "why_not"]

HERE = Path(__file__).parent
_FLAGS = ("-shared", *forms.FLAGS)
# The first set that the compiler accepts is used: wide vectors on x86, otherwise the native instruction set.
_TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
_DIGEST = hashlib.sha256().digest_size


def why_not() -> str | None:
    """Why the code cannot run on this machine, or None if it can. The first call may compile it (10 s)."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BuildError: there is no prebuilt library and none can be compiled, or the library does not load.
        InputError: ``SENET_NATIVE`` has an unknown value.
    """
    return _loaded()[0]


def loaded_from() -> Path:
    """The file of the loaded library. Raises the same errors as ``library``."""
    return _loaded()[1]


def _loaded() -> tuple[ctypes.CDLL, Path]:
    result = _attempt()
    if isinstance(result, BuildError):
        raise result
    return result


@functools.cache
def _attempt() -> tuple[ctypes.CDLL, Path] | BuildError:
    choice = os.environ.get("SENET_NATIVE") or "auto"
    ways = {"auto": (_prebuilt, _built), "prebuilt": (_prebuilt,), "build": (_built,)}
    if choice not in ways:
        raise InputError(f"SENET_NATIVE={choice!r} is unknown; choose one of {', '.join(ways)}")
    reasons = []
    for way in ways[choice]:
        try:
            path = way()
            _share_openmp()
            return _opened(path), path
        except (BuildError, InputError) as error:
            reasons.append(str(error))
        except OSError as error:  # the folder is not writable, or the library does not load
            reasons.append(f"the compiled code cannot be saved or loaded: {error}")
    return BuildError("; ".join(reasons))


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    reason = mismatch(library)
    if reason is not None:
        raise BuildError(f"{path} was built for another version of senet ({reason}); reinstall senet")
    return library


def _prebuilt() -> Path:
    form = forms.best(forms.PREBUILT)
    if form is None:
        what = "for this processor" if forms.PREBUILT.is_dir() else "(the Linux wheels include it)"
        raise BuildError(f"this installation has no prebuilt code {what}")
    return form.path(forms.PREBUILT)


def _share_openmp() -> None:
    """Make PyTorch's OpenMP runtime visible to the library: a second runtime's threads would compete for the cores.

    Importing PyTorch normally makes its runtime visible to all libraries. If it did not, this function does.
    """
    import torch  # noqa: F401

    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    for path in sorted(loaded):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return


def _built() -> Path:
    """The library for this source, compiler, and processor. It is compiled if it is missing or damaged."""
    path = compiler()
    if path is None:
        raise BuildError("no C++ compiler was found (install g++ or clang, or set CXX)")
    sources = [file.read_text(encoding="utf-8") for file in sorted(HERE.glob("*.[ch]pp"))]
    key = "\0".join((forms.run([path, "--version"]).stdout, _processor(), repr((_FLAGS, _TARGETS)), *sources))
    target = cache_folder() / f"native-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if not _is_whole(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(path, target)
    return target


def _is_whole(path: Path) -> bool:
    """Whether a cached library matches the digest at its end. (Loading a truncated file would crash the process.)"""
    content = path.read_bytes() if path.is_file() else b""
    return len(content) > _DIGEST and hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _processor(cpuinfo: Path = forms.CPUINFO) -> str:
    """Identifies the processor: a library compiled for one may use instructions that another lacks."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])


def _compile(compiler_path: str, target: Path) -> None:
    """Compile to a temporary file in the same folder, then rename it: no other process sees a partial file."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    first: BuildError | None = None
    try:
        for options in _TARGETS:
            try:
                forms.compile_with([compiler_path, *_FLAGS, *options, str(forms.SOURCE), "-o", name])
            except BuildError as error:
                first = first or error
                continue
            with open(name, "r+b") as file:
                digest = hashlib.sha256(file.read()).digest()
                file.write(digest)
            os.replace(name, target)
            return
    finally:
        Path(name).unlink(missing_ok=True)
    assert first is not None
    raise first
