"""The prebuilt forms of the C++ library: their processors, how to compile them, and how to choose one.

A wheel contains them in the folder ``prebuilt``. This file needs only Python's standard library: the package's build
hook loads it without PyTorch.
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
# No -ffast-math: NaN and infinity must propagate, and sums must keep their order.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

# The features of the x86-64 levels, as named in /proc/cpuinfo. (`abm` is lzcnt. Linux hides features whose state it
# cannot save.)
_V3 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
_V4 = f"{_V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@dataclass(frozen=True)
class Form:
    """A form of the library, compiled for one class of processors.

    Attributes:
        name: name of the file and of the class of processors.
        machine: the architecture, as named by ``platform.machine()`` and wheel tags.
        options: compiler options.
        features: features that the processor must have, as named in ``/proc/cpuinfo``.
    """

    name: str
    machine: str
    options: tuple[str, ...]
    features: frozenset[str]

    def path(self, folder: Path) -> Path:
        """The file of this form in a folder of forms."""
        return folder / f"{self.name}.so"


# Matrix products take up to 4 % longer than with -march=native under GCC's generic tuning, and 0.5 % longer under this
# one (measured on a Zen 5; python benchmarks/prebuilt.py).
_TUNED = "-mtune=znver3"

# In order of preference.
FORMS = (
    Form("x86-64-v4", "x86_64", ("-march=x86-64-v4", "-mprefer-vector-width=512", _TUNED), frozenset(_V4.split())),
    Form("x86-64-v3", "x86_64", ("-march=x86-64-v3", _TUNED), frozenset(_V3.split())),
    Form("armv8-a", "aarch64", ("-march=armv8-a",), frozenset(("fp", "asimd"))),
)


class BuildError(RuntimeError):
    """The C++ code cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str | None:
    """The path of the C++ compiler: the first that exists of ``CXX``, g++, clang++, c++, and cl; otherwise None."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; its output is decoded independently of the locale."""
    return subprocess.run(command, capture_output=True, check=False, encoding="utf-8", errors="replace")


def compile_with(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises:
        BuildError: the compiler failed; the message has the first line of its output.
    """
    result = run(command)
    if result.returncode:
        first_line = result.stderr.strip().partition("\n")[0]
        raise BuildError(f"{command[0]} cannot compile the C++ code: {first_line}")


def compile_form(form: Form, compiler_path: str, target: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile a form to ``target`` with GCC.

    The library is not linked to an OpenMP runtime, so it can only use PyTorch's (``build._share_openmp``).

    Raises:
        BuildError: the compiler fails, or is not GCC: other compilers use a different OpenMP runtime.
    """
    if "clang" in run([compiler_path, "--version"]).stdout:
        raise BuildError(f"{compiler_path} is clang, which does not use PyTorch's OpenMP runtime")
    with tempfile.TemporaryDirectory() as folder:
        compiled = str(Path(folder, "library.o"))
        compile_with([compiler_path, *FLAGS, *form.options, *extra, "-c", str(SOURCE), "-o", compiled])
        compile_with([compiler_path, "-shared", compiled, "-o", str(target)])


def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The features of the processor; empty if Linux does not report them."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(told, "").split())


def best(folder: Path, cpuinfo: Path = CPUINFO) -> Form | None:
    """The best form in the folder that runs on this processor, or None."""
    here, machine = features(cpuinfo), platform.machine()
    return next((f for f in FORMS if f.machine == machine and f.features <= here and f.path(folder).is_file()), None)
