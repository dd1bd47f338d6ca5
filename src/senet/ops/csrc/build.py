"""Loads the C++ library: the prebuilt form that the package brought for this processor, or one that is compiled here.

What is compiled is made once, for this very processor, and kept for later processes.
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
# The first set that the compiler takes: wide vectors on x86; whatever the machine has, elsewhere.
_TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
_DIGEST = hashlib.sha256().digest_size


def why_not() -> str | None:
    """Why the code cannot run on this machine, in words; None if it can. May compile it (10 s) the first time."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BuildError: there is no prebuilt form, and no compiler, or it fails, or its result does not load.
        InputError: ``SENET_NATIVE`` is none of its values.
    """
    return _loaded()[0]


def loaded_from() -> Path:
    """The file of the loaded library. Raises what ``library`` raises."""
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
        raise InputError(f"SENET_NATIVE={choice!r} is none of {', '.join(ways)}")
    reasons = []
    for way in ways[choice]:
        try:
            path = way()
            _share_openmp()
            return _opened(path), path
        except (BuildError, InputError) as error:
            reasons.append(str(error))
        except OSError as error:  # a folder that cannot be written, a library that does not load
            reasons.append(f"the compiled code cannot be kept or loaded: {error}")
    return BuildError("; ".join(reasons))


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    reason = mismatch(library)
    if reason is not None:
        raise BuildError(f"{path} was made for another version of senet ({reason}): install senet again")
    return library


def _prebuilt() -> Path:
    form = forms.best(forms.PREBUILT)
    if form is None:
        what = "for this processor" if forms.PREBUILT.is_dir() else "(the wheels for Linux have it)"
        raise BuildError(f"this installation has no prebuilt code {what}")
    return form.path(forms.PREBUILT)


def _share_openmp() -> None:
    """Let the library find the OpenMP runtime of PyTorch: threads of a second one would fight for the same cores.

    PyTorch's own start makes its runtime visible to every library; where it has not, that is made up for here.
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
    """The path of the library for this source, compiler and processor; compiled if it is not there, or damaged."""
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
    """Whether a kept library is what was compiled: its digest follows it. (Loading half a file ends the process.)"""
    content = path.read_bytes() if path.is_file() else b""
    return len(content) > _DIGEST and hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _processor(cpuinfo: Path = forms.CPUINFO) -> str:
    """What tells processors apart: a library made for one may use instructions that another has not."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])


def _compile(compiler_path: str, target: Path) -> None:
    """Compile to a temporary file beside ``target`` and move it there: another process never sees half a file."""
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
