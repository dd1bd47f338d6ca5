"""The C++ library: the same bits whoever runs it, and what happens where it cannot be compiled or kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from senet.ops.csrc import build
from senet.ops.tail import native

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
BIG = (3, 40, 31, 33)  # several blocks of rows an image


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", ["batch", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads_and_every_time(case, threads, layout, norm, dtype):
    one = case(BIG, norm=norm, layout=layout, dtype=dtype)
    runs = []
    for number in (1, 2, 5, 2):
        threads(number)
        runs.append(one.run("native"))
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


@needs_compiler
@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 260), (torch.float64, 190), (torch.bfloat16, 370)])
def test_maps_past_the_caches(case, dtype, side):
    one = case((1, 64, side, side), layout="channels_last", dtype=dtype, relu=False)  # over 16 MB
    undecided = one.run("autograd", wide=True)["out"].abs() < 0.03  # there rounding decides
    one.relu, one.dout = True, one.dout.masked_fill(undecided, 0)
    mine, right = one.run("native"), one.run("autograd", wide=True)
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}[dtype]
    for name, expected in right.items():
        assert (mine[name] - expected).abs().max() <= tolerance * expected.abs().max(), name


@needs_compiler
@pytest.mark.parametrize("channels", [4, 16])
def test_nan_and_infinity_come_through(case, channels):
    one = case((2, channels, 5, 5), dtype=torch.float32, layout="channels_last")
    with torch.no_grad():
        one.u[0, 1, 2, 2] = torch.nan
    mine, right = one.run("native")["out"], one.run("autograd")["out"]
    assert torch.equal(mine.isnan(), right.isnan())
    assert mine.isnan().any()
    mine, right = (one.run(implementation)["dshortcut"] for implementation in ("native", "autograd"))
    assert torch.equal(mine, right)  # past NaN the gradient goes, as in PyTorch
    with torch.no_grad():
        one.u[0, 1, 2, 2] = 1.0
        one.shortcut[1, 0, 0, 0] = torch.inf
    out = one.run("native")["out"]
    assert out[1, 0, 0, 0] == torch.inf
    assert out.isfinite().sum() == out.numel() - 1


@needs_compiler
def test_rounding_to_bfloat16_is_pytorchs():
    u = torch.cat([torch.randn(1, 1, 4096) * scale for scale in (1e-39, 1e-3, 1.0, 1e38)], -1)
    u = torch.cat([u, torch.tensor([[[torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38]]])], -1)
    u16, table = u.bfloat16(), torch.zeros(1, 1)
    out = native.affine(u16, table, table + 1 + 2**-9, table, None, False)
    torch.testing.assert_close(out, (u16.float() * (1 + 2**-9)).bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_weights_of_another_size_are_not_read_past_their_end(case):
    one = case((2, 8, 9, 9))
    one.norm = torch.nn.BatchNorm2d(4).double()
    with pytest.raises(RuntimeError) as ordinary:
        one.norm(one.u)
    with pytest.raises(RuntimeError) as ours:
        one.forward("native")
    assert str(ours.value) == str(ordinary.value)


def in_a_new_process(code, **environment):
    full = {key: value for key, value in os.environ.items() if key not in ("CXX", "SENET_BACKEND")} | environment
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, env=full, capture_output=True, text=True, check=False)


NETWORK = """
import torch, senet
from senet.ops.tail.tail import norm_tail
se = senet.SqueezeExcite(16)
u = torch.randn(2, 16, 64, 64, requires_grad=True)
for _ in range(3):
    norm_tail(u, torch.nn.BatchNorm2d(16), se.excitation, u, True, "auto").sum().backward()
print("ran")
try:
    with senet.use_backend("native"):
        print("native")
except senet.InputError as error:
    print(error)
"""


@pytest.fixture
def failing_compiler(tmp_path):
    path = tmp_path / "bad-g++"
    path.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("trouble", ["no compiler", "a compiler that fails", "a folder that cannot be written"])
def test_without_a_library_auto_warns_once_and_asking_by_name_says_why(tmp_path, failing_compiler, trouble):
    (tmp_path / "file").write_text("")
    environment, reason = {
        "no compiler": ({"PATH": ""}, "no C++ compiler was found"),
        "a compiler that fails": ({"CXX": str(failing_compiler)}, "no such processor"),
        "a folder that cannot be written": ({"SENET_CACHE": str(tmp_path / "file" / "below")}, "cannot be saved"),
    }[trouble]
    if "folder" in trouble and build.compiler() is None:
        pytest.skip("no C++ compiler")
    run = in_a_new_process(NETWORK, **{"SENET_CACHE": str(tmp_path / "cache"), **environment})
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("the fast CPU code is not used") == 1
    assert reason in run.stderr
    first, second = run.stdout.splitlines()
    assert first == "ran"
    assert second.startswith("use_backend='native' cannot run here: ")
    assert reason in second
    assert not list(tmp_path.glob("cache/*"))


@needs_compiler
@pytest.mark.slow  # compiles twice
def test_what_lies_in_the_cache_is_used_and_made_again_if_it_is_damaged(tmp_path):
    environment = {"SENET_CACHE": str(tmp_path)}
    assert in_a_new_process(NETWORK, **environment).stdout == "ran\nnative\n"
    (library,) = Path(tmp_path).iterdir()
    made = library.stat().st_mtime_ns
    assert in_a_new_process(NETWORK, **environment).stdout == "ran\nnative\n"
    assert library.stat().st_mtime_ns == made
    library.write_text("not a library")
    (tmp_path / "tmp1234.so").write_text("half a file that a killed compiler left")
    run = in_a_new_process(NETWORK, **environment)
    assert run.stdout == "ran\nnative\n", run.stderr
    assert library.stat().st_size > 10_000
