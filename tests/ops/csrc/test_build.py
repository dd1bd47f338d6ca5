"""Which library is loaded: a prebuilt form or one compiled here; what happens to damaged files; where they are kept."""

import ctypes
import functools
import os
import platform
import subprocess
import sys

import pytest

from senet import InputError
from senet.ops.csrc import build, forms
from senet.ops.csrc.arguments import STRUCTURES

needs_gcc = pytest.mark.skipif(
    sys.platform != "linux" or "Free Software" not in forms.run([build.compiler() or "true", "--version"]).stdout,
    reason="no GCC",
)
FLAGS = {form.name: " ".join(sorted(form.features)) for form in forms.FORMS}
SMALL = """
#include <omp.h>
extern "C" int threads() {
    int sum = 0;
#pragma omp parallel num_threads(3) reduction(+ : sum)
    sum += omp_get_num_threads() == 3;
    return sum;
}
struct Constant { const char *name; long long value; };
static const Constant CONSTANTS[] = {SIZES {nullptr, 0}};
extern "C" const Constant *senet_constants() { return CONSTANTS; }
"""


def small(**sizes):
    """The source of a small library that says what sizes its arguments have."""
    right = {structure.__name__: ctypes.sizeof(structure) for structure in STRUCTURES}
    told = "".join(f'{{"sizeof {name}", {size}}}, ' for name, size in (right | sizes).items())
    return SMALL.replace("SIZES", told)


def told(path, **lines):
    path.write_text("".join(f"{name.replace('_', ' ')}\t: {value}\n" for name, value in lines.items()))
    return path


@pytest.fixture
def prebuilt(tmp_path):
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for form in forms.FORMS:
        form.path(folder).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("machine", "lines", "expected"),
    [
        ("x86_64", {"flags": f"fpu sse2 {FLAGS['x86-64-v4']} vaes"}, "x86-64-v4"),
        ("x86_64", {"flags": f"fpu sse2 {FLAGS['x86-64-v3']} avx512f"}, "x86-64-v3"),
        ("x86_64", {"flags": FLAGS["x86-64-v3"].replace("fma", "fma4")}, None),
        ("x86_64", {"model_name": FLAGS["x86-64-v3"]}, None),
        ("aarch64", {"Features": "fp asimd evtstrm aes"}, "armv8-a"),
        ("aarch64", {"flags": FLAGS["x86-64-v4"], "Features": "fp"}, None),
        ("riscv64", {"flags": FLAGS["x86-64-v4"]}, None),
    ],
)
def test_the_best_form_that_the_processor_runs(monkeypatch, tmp_path, prebuilt, machine, lines, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    form = forms.best(prebuilt, told(tmp_path / "cpuinfo", **lines))
    assert (form and form.name) == expected


def test_a_form_that_was_not_shipped_is_not_chosen(monkeypatch, tmp_path, prebuilt):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = told(tmp_path / "cpuinfo", flags=FLAGS["x86-64-v4"])
    (prebuilt / "x86-64-v4.so").unlink()
    assert forms.best(prebuilt, cpuinfo).name == "x86-64-v3"
    assert forms.best(tmp_path / "nothing", cpuinfo) is None
    assert forms.best(prebuilt, tmp_path / "no cpuinfo") is None


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A start of the package on a small library: the functions of ``build`` as a new process would find them."""
    source = tmp_path / "small.cpp"
    source.write_text(small())
    monkeypatch.setattr(forms, "SOURCE", source)
    monkeypatch.setattr(forms, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("SENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SENET_NATIVE", raising=False)
    attempt = build._attempt.__wrapped__

    def again(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(build, "_attempt", functools.cache(attempt))
        return build

    return again


@pytest.fixture
def small_form(tmp_path, start):
    """The path of a prebuilt form of the small library, for this very machine."""
    form = next(f for f in reversed(forms.FORMS) if f.machine == platform.machine())
    if not form.features <= forms.features():
        pytest.skip("an old processor")
    (tmp_path / "prebuilt").mkdir()
    forms.compile_form(form, build.compiler(), form.path(tmp_path / "prebuilt"))
    return form.path(tmp_path / "prebuilt")


@needs_gcc
def test_prebuilt_code_needs_no_compiler_and_leaves_no_file(tmp_path, start, small_form):
    here = start(PATH="", CXX="no-such-compiler")
    assert here.library().threads() == 3
    assert here.loaded_from() == small_form
    assert not (tmp_path / "cache").exists()


@needs_gcc
def test_what_is_wanted_can_be_said(tmp_path, start, small_form):
    built = start(SENET_NATIVE="build").loaded_from()
    assert built.parent == tmp_path / "cache"
    assert build.library().threads() == 3
    assert start(SENET_NATIVE="prebuilt").loaded_from() == small_form
    small_form.unlink()
    assert "no prebuilt code" in start().why_not()
    assert start(SENET_NATIVE="auto").loaded_from() == built
    with pytest.raises(InputError, match=r"'prebuild'.*auto, prebuilt, build"):
        start(SENET_NATIVE="prebuild").library()


@needs_gcc
def test_a_prebuilt_form_that_does_not_load_is_made_up_for(tmp_path, start, small_form):
    small_form.write_bytes(b"made for another C library")
    assert start().loaded_from().parent == tmp_path / "cache"


@needs_gcc
@pytest.mark.parametrize(
    ("source", "reason"),
    [(small(Tail=8), "Tail has 8 bytes"), ("int nothing;", "does not report"), (small(Run=0), "Run has 0 bytes")],
    ids=["a smaller structure", "before structures", "another one"],
)
def test_a_library_of_other_arguments_is_refused_in_one_line(tmp_path, start, small_form, source, reason):
    other = tmp_path / "other.cpp"
    other.write_text(source)
    forms.compile_with([build.compiler(), *forms.FLAGS, "-shared", str(other), "-o", str(small_form)])
    why = start(SENET_NATIVE="prebuilt").why_not()
    assert reason in why
    assert str(small_form) in why
    assert "\n" not in why
    assert start(SENET_NATIVE="auto").loaded_from().parent == tmp_path / "cache"  # compiled here instead


def test_with_neither_both_reasons_are_said(start):
    reason = start(PATH="", CXX="no-such-compiler").why_not()
    assert "no prebuilt code" in reason
    assert "install g++" in reason


@needs_gcc
@pytest.mark.parametrize("damage", ["cut", "empty", "one byte", "another file"])
def test_damaged_files_in_the_cache_are_compiled_again(start, damage):
    path = start(SENET_NATIVE="build").loaded_from()
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.unlink()  # not written over: it is loaded
    path.write_bytes({
        "cut": whole[:middle],
        "empty": b"",
        "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "another file": b"no library\n" * 1000,
    }[damage])  # fmt: skip
    assert start().library().threads() == 3
    assert build.loaded_from() == path
    assert len(path.read_bytes()) == len(whole)
    assert list(path.parent.iterdir()) == [path]


ONE_RUNTIME = """
import ctypes, sys
real = ctypes.CDLL
ctypes.CDLL = lambda name, mode=0, **rest: real(name, **rest)  # a PyTorch that keeps its runtime to itself
import torch
ctypes.CDLL = real
from pathlib import Path
from senet.ops.csrc import build, forms
forms.PREBUILT = Path(sys.argv[1])
build.library().threads.restype = ctypes.c_int
maps = Path("/proc/self/maps").read_text().splitlines()
print(build.library().threads(), len({line.split()[-1] for line in maps if "libgomp" in line}))
"""


@needs_gcc
def test_the_runtime_is_pytorchs_even_where_it_is_hidden(small_form):
    environment = {**os.environ, "PATH": "", "SENET_NATIVE": "prebuilt"}
    command = [sys.executable, "-c", ONE_RUNTIME, str(small_form.parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["3", "1"], run.stderr
