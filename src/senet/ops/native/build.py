"""Compiles the C++ of this folder once, for this very processor, and loads it; it is kept for later processes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "library.cpp"
# No -ffast-math: NaN and infinity keep their meaning, and sums keep their order.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# The first set that the compiler takes: wide vectors on x86; whatever the machine has, elsewhere.
_TARGETS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))


class BuildError(RuntimeError):
    """The C++ code cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str | None:
    """The path of the C++ compiler: ``CXX``, else g++, clang++, c++ or cl; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why the code cannot run on this machine, in words; None if it can. Compiles it (10 s) the first time."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _attempt() -> ctypes.CDLL | BuildError:
    try:
        path = _built()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # what lies in the cache is not what was put there
            path.unlink()
            return ctypes.CDLL(str(_built()))
    except BuildError as error:
        return error
    except OSError as error:  # a folder that cannot be written, a library that does not load
        return BuildError(f"the compiled code cannot be kept or loaded: {error}")


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BuildError: there is no compiler, it fails, or its result does not load.
    """
    result = _attempt()
    if isinstance(result, BuildError):
        raise result
    return result


def cache_folder() -> Path:
    """Where compiled code is kept: ``SENET_CACHE``, else ``senet`` in the user's cache folder."""
    own = os.environ.get("SENET_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "senet"


def _built() -> Path:
    """The path of the library for this source, compiler and processor; compiled if it is not there."""
    path = compiler()
    if path is None:
        raise BuildError("no C++ compiler was found (install g++ or clang, or set CXX)")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [file.read_text() for file in sorted(HERE.glob("*.[ch]pp"))]
    key = hashlib.sha256("\0".join((version, _processor(), repr((_FLAGS, _TARGETS)), *sources)).encode())
    target = cache_folder() / f"native-{key.hexdigest()[:20]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(path, target)
    return target


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What tells processors apart: a library made for one may use instructions that another has not."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])


def _compile(compiler_path: str, target: Path) -> None:
    """Compile to a temporary file beside ``target`` and move it there: another process never sees half a file."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    message = ""
    try:
        for options in _TARGETS:
            command = [compiler_path, *_FLAGS, *options, str(SOURCE), "-o", name]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                os.replace(name, target)
                return
            message = message or run.stderr.strip().partition("\n")[0]
    finally:
        Path(name).unlink(missing_ok=True)
    raise BuildError(f"{compiler_path} cannot compile the C++ code: {message}")
