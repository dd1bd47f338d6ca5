"""The prebuilt forms of the C++ library: for which processors they are, how they are compiled, which one runs here.

A wheel carries them in the folder ``prebuilt``. This file needs nothing but Python's standard library: the build hook of
the package loads it where there is no PyTorch.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "library.cpp"
PREBUILT = HERE / "prebuilt"
CPUINFO = Path("/proc/cpuinfo")
# No -ffast-math: NaN and infinity keep their meaning, and sums keep their order.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_TEXT = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace", "check": False}

# What the levels of x86-64 consist of, as /proc/cpuinfo names it (`abm` holds lzcnt; Linux hides what it does not save).
_V3 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@dataclass(frozen=True)
class Form:
    """A form of the library.

    Attributes:
        name: of the file, and of what its processors have in common.
        machine: the architecture, as ``platform.machine()`` and the tags of wheels name it.
        options: of the compiler.
        features: what the processor must have, in the words of ``/proc/cpuinfo``.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    features: frozenset[str]

    def path(self, folder: Path = PREBUILT) -> Path:
        """Where it lies."""
        return folder / f"{self.name}.so"


# The best first.
FORMS = (
    Form("x86-64-v4", "x86_64", ("-march=x86-64-v4", "-mprefer-vector-width=512"), frozenset(_V4.split())),
    Form("x86-64-v3", "x86_64", ("-march=x86-64-v3",), frozenset(_V3.split())),
    Form("armv8-a", "aarch64", ("-march=armv8-a",), frozenset(("fp", "asimd"))),
)


class BuildError(RuntimeError):
    """The C++ code cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str | None:
    """The path of the C++ compiler: ``CXX``, else g++, clang++, c++ or cl; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def version(compiler_path: str) -> str:
    """What the compiler says that it is."""
    return subprocess.run([compiler_path, "--version"], **_TEXT).stdout


def run_compiler(command: Iterable[str]) -> None:
    """Run a compiler.

    Raises:
        BuildError: it failed.
    """
    command = list(command)
    run = subprocess.run(command, **_TEXT)
    if run.returncode:
        raise BuildError(f"{command[0]} cannot compile the C++ code: {run.stderr.strip().partition(chr(10))[0]}")


def compile_form(form: Form, compiler_path: str, target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile a form to ``target`` with GCC.

    It is not linked to an OpenMP runtime, so that it can only take PyTorch's (``build.share_openmp``).

    Raises:
        BuildError: the compiler fails, or is none of GCC's: others call a runtime of their own.
    """
    if "clang" in version(compiler_path):
        raise BuildError(f"{compiler_path} is clang, whose OpenMP is not PyTorch's")
    with tempfile.TemporaryDirectory() as folder:
        compiled = str(Path(folder, "library.o"))
        run_compiler([compiler_path, *FLAGS, *form.options, *extra, "-c", str(SOURCE), "-o", compiled])
        run_compiler([compiler_path, "-shared", compiled, "-o", str(target)])


def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What the processor can do; empty where Linux does not tell."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(told, "").split())


def best(folder: Path = PREBUILT, cpuinfo: Path = CPUINFO) -> Form | None:
    """The best form in the folder that this processor runs; None if there is none."""
    here, machine = features(cpuinfo), platform.machine()
    return next((f for f in FORMS if f.machine == machine and f.features <= here and f.path(folder).is_file()), None)
