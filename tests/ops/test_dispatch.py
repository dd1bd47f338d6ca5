"""The registry: who asked for which backend, and whether it is what runs."""

import dataclasses
import threading
import warnings

import pytest
import torch
from torch import nn

import senet
from helpers.tails import tail
from senet.ops import dispatch as backend
from senet.ops.dispatch import Sweeps, sweeps_of
from senet.ops.tail import inductor as compiler
from senet.ops.tail import native

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason="no C++ compiler")
BIG = torch.zeros(1, backend.SMALLEST_NATIVE, 1, 1)


def test_the_innermost_name_counts_and_the_outer_one_comes_back(monkeypatch):
    monkeypatch.delenv("SENET_BACKEND", raising=False)
    assert backend.current_backend() == "auto"
    with senet.use_backend("reference"):
        assert backend.current_backend() == "reference"
        with senet.use_backend("auto"):
            assert backend.current_backend() == "auto"
        with pytest.raises(ZeroDivisionError), senet.use_backend("auto"):
            1 / 0  # noqa: B018
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == "auto"


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("SENET_BACKEND", "reference")
    assert backend.backend_for(BIG) == "reference"
    with senet.use_backend("auto"):
        assert backend.current_backend() == "auto"
    monkeypatch.setenv("SENET_BACKEND", "fastest")
    with pytest.raises(senet.InputError, match="SENET_BACKEND='fastest' is not a backend; choose one of auto, "):
        backend.backend_for(BIG)


def test_each_thread_has_its_own_choice():
    seen, inside, leave = {}, threading.Event(), threading.Event()

    def other():
        with senet.use_backend("reference"):
            inside.set()
            leave.wait(10)
            seen["other"] = backend.current_backend()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen["here"] = backend.current_backend()
    leave.set()
    thread.join(10)
    assert seen == {"here": "auto", "other": "reference"}


def test_an_unknown_name_and_one_that_cannot_run_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(senet.InputError, match=r"use_backend='cuda' is not a backend; choose one of auto, reference, "):
        senet.use_backend("cuda").__enter__()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(senet.InputError, match=r"'compiled' cannot run here: torch.compile is disabled"):
        senet.use_backend("compiled").__enter__()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(senet.InputError, match=r"'triton' cannot run here: (no CUDA device|Triton is not installed)"):
        senet.use_backend("triton").__enter__()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(senet.InputError, match=r"needs a C\+\+ compiler, and none was found"):
        senet.use_backend("compiled").__enter__()


@needs_compiler
def test_auto_is_native_for_large_maps_of_its_types_on_the_cpu():
    assert backend.backend_for(BIG) == "native"
    assert backend.backend_for(BIG.bfloat16()) == "native"
    assert backend.backend_for(BIG.half()) == "reference"
    assert backend.backend_for(BIG[:, 1:]) == "reference"
    assert backend.backend_for(BIG.to("meta")) == "reference"
    with senet.use_backend("native"):
        assert backend.backend_for(BIG[:, 1:]) == "native"
        assert backend.backend_for(BIG.to("meta")) == "reference"
        with pytest.raises(senet.InputError, match=r"'native' got a torch.float16 .* on cpu; it supports float32"):
            backend.backend_for(BIG.half())


def compiled_tail(shape, layout, training):
    u = torch.randn(shape).to(memory_format=layout).requires_grad_()
    norm, se = nn.BatchNorm2d(shape[1]).train(training), senet.SqueezeExcite(shape[1])
    with senet.use_backend("compiled"), torch.set_grad_enabled(training):
        out = tail(u, norm, se, u)
        if training:
            out.sum().backward()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_new_sizes_do_not_compile_anew(layout):
    shapes = [(2, 8, 5, 7), (3, 8, 5, 7), (2, 16, 9, 9), (5, 24, 3, 2), (7, 40, 31, 11)]
    shapes += [(1, *s[1:]) for s in shapes] + [(*s[:2], 1, 1) for s in shapes]
    for training in (True, False):
        for shape in shapes:
            compiled_tail(shape, layout, training)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, c, h, w in shapes:
            for training in (True, False):
                compiled_tail((n + (n > 1), c + 1, h + (h > 1), w + (w > 1)), layout, training)
    assert not compiler._broken


@needs_compiler
def test_where_the_compiler_fails_the_definitions_run_with_one_warning(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("ld: cannot find -lgomp\nsecond line")

    monkeypatch.setattr(compiler, "_compiled", lambda body, key: fail)
    monkeypatch.setattr(compiler, "_broken", [])
    u = torch.randn(2, 4, 3, 3)
    with pytest.warns(
        UserWarning, match="torch.compile failed; the sweeps run uncompiled, .*: ld: cannot find"
    ) as seen:
        m, _, v = compiler.moments(u)
    assert len(seen) == 1
    torch.testing.assert_close(v, u.var((2, 3), correction=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler.affine(u, m, v, v, None, True)


@pytest.mark.parametrize("name", ["reference", "compiled", "native", "triton"])
def test_every_backend_has_every_sweep(name):
    if name == "triton":
        pytest.importorskip("triton")
    assert all(callable(getattr(sweeps_of(name), field.name)) for field in dataclasses.fields(Sweeps))
