"""The prebuilt forms of the C++ library: for which processors they are, how they are compiled, which one runs here.

A wheel carries them in the folder ``prebuilt``. This file needs nothing but Python's standard library: the build hook
of the package loads it where there is no PyTorch.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "library.cpp"
PREBUILT = HERE / "prebuilt"
CPUINFO = Path("/proc/cpuinfo")
# No -ffast-math: NaN and infinity keep their meaning, and sums keep their order.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

# What the levels of x86-64 consist of, as /proc/cpuinfo names it. (`abm` is lzcnt. Linux hides what it cannot save.)
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

    def path(self, folder: Path) -> Path:
        """Where it lies in a folder of forms."""
        return folder / f"{self.name}.so"


# With GCC's generic tuning products of matrices take up to 4 % longer than with -march=native, with this one 0.5 %
# (measured on a Zen 5; python benchmarks/prebuilt.py).
_TUNED = "-mtune=znver3"

# The best first.
FORMS = (
    Form("x86-64-v4", "x86_64", ("-march=x86-64-v4", "-mprefer-vector-width=512", _TUNED), frozenset(_V4.split())),
    Form("x86-64-v3", "x86_64", ("-march=x86-64-v3", _TUNED), frozenset(_V3.split())),
    Form("armv8-a", "aarch64", ("-march=armv8-a",), frozenset(("fp", "asimd"))),
)


class BuildError(RuntimeError):
    """The C++ code cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str | None:
    """The path of the C++ compiler: ``CXX``, else g++, clang++, c++ or cl; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; what it says is read whatever the locale."""
    return subprocess.run(command, capture_output=True, check=False, encoding="utf-8", errors="replace")


def compile_with(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises:
        BuildError: it failed; the message has the first line of what it said.
    """
    result = run(command)
    if result.returncode:
        first_line = result.stderr.strip().partition("\n")[0]
        raise BuildError(f"{command[0]} cannot compile the C++ code: {first_line}")


def compile_form(form: Form, compiler_path: str, target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile a form to ``target`` with GCC.

    It is not linked to an OpenMP runtime, so that it can only take PyTorch's (``build.share_openmp``).

    Raises:
        BuildError: the compiler fails, or is none of GCC's: others call a runtime of their own.
    """
    if "clang" in run([compiler_path, "--version"]).stdout:
        raise BuildError(f"{compiler_path} is clang, whose OpenMP is not PyTorch's")
    with tempfile.TemporaryDirectory() as folder:
        compiled = str(Path(folder, "library.o"))
        compile_with([compiler_path, *FLAGS, *form.options, *extra, "-c", str(SOURCE), "-o", compiled])
        compile_with([compiler_path, "-shared", compiled, "-o", str(target)])


def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What the processor can do; empty where Linux does not tell."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(told, "").split())


def best(folder: Path, cpuinfo: Path = CPUINFO) -> Form | None:
    """The best form in the folder that this processor runs; None if there is none."""
    here, machine = features(cpuinfo), platform.machine()
    return next((f for f in FORMS if f.machine == machine and f.features <= here and f.path(folder).is_file()), None)
