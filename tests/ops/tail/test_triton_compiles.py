"""The Triton kernels compile to code for a Hopper GPU, for which Triton needs none: this shows errors and slow accesses
that its interpreter hides.
"""

import importlib.util
import os
import re

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

FLAGS = {"LAST": True, "LIMIT": 128, "VECTOR": 16, "TILE": 2048, "WIDTH": 64, "RELU": True, "AVERAGED": False}
FLAGS |= {"SHARED": False}
BLOCKS = {"BLOCK_M": 64, "BLOCK_O": 128, "BLOCK_C": 64, "C_VECTOR": 16, "O_VECTOR": 16, "GROUP": 8, "PRECISION": "ieee"}
MAPS = {"u", "other", "out", "dout", "g", "h", "weight", "shortcut"}
INTEGERS = {"channels", "N", "S", "C", "M", "O", "parts", "length", "tables", "bucket", "count", "stride", "rows"}


def hopper_ptx(kernel, map_type="bf16", **constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel.fn if hasattr(kernel, "configs") else kernel
    types, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(place,)] = "constexpr", constants[name]
        elif name in INTEGERS:
            types[name] = "i32"
        else:
            types[name] = "*" + (map_type if name in MAPS else "fp32")
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("map_type", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["moments", "affine", "affine_backward"])
def test_a_sweep_compiles_for_hopper_and_moves_16_bytes_a_thread(name, map_type, last):
    from senet.ops.tail import triton as triton_kernels
    from senet.ops.tail import triton_moments

    home = triton_moments if name == "moments" else triton_kernels
    ptx = hopper_ptx(getattr(home, f"_{name}_kernel"), map_type, **{**FLAGS, "LAST": last})
    assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10", ptx)
    assert "cp.async.ca" not in ptx  # the form for less than 16 bytes
    if name != "moments":  # it writes no map, and reads single pixels: its pilots
        assert "st.global.v4.b32" in ptx
        assert not re.search(r"(ld|st)\.global\.(v2|b16)", ptx)


def test_the_small_kernels_and_the_odd_cases_compile_for_hopper():
    from senet.ops.tail import triton as kernels
    from senet.ops.tail import triton_moments as of_moments

    small = {"ROWS": 64, "LIMIT": 128, "VECTOR": 16, "WIDTH": 64}
    ptx = hopper_ptx(of_moments._small_moments_kernel, **small)
    assert "ld.global.v4.b32" in ptx
    hopper_ptx(of_moments._combine_kernel, LAST=True, PARTS=16, BLOCK=64)
    hopper_ptx(
        of_moments._moments_kernel, from_pivot=None, variance=None, **{**FLAGS, "LAST": False, "VECTOR": 1, "LIMIT": 64}
    )
    absent = dict.fromkeys(("center", "constant", "other", "other_factor", "offset"))
    hopper_ptx(kernels._affine_kernel, **absent, **{**FLAGS, "VECTOR": 1, "LIMIT": 4})


def test_the_product_uses_the_matrix_units_of_hopper():
    from senet.ops.conv import triton as gemm

    ptx = hopper_ptx(gemm._gated_kernel, RELU=True, **BLOCKS)
    assert "wgmma.mma_async" in ptx
    assert "ld.global.v4.b32" in ptx  # the shortcut
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize("gate", range(6))
def test_the_tables_of_the_one_node_tail_compile_for_hopper(gate):
    from senet.ops.tail import triton_batch_norm as one_node

    walk = {"ROWS": 64, "CHANNELS": 16}
    hopper_ptx(one_node._gate_kernel, GATE=gate, BLOCK=512)
    hopper_ptx(one_node._gate_backward_kernel, GATE=gate, BLOCK=512)
    hopper_ptx(one_node._gated_norm_backward_kernel, GATE=gate, **walk)
    if not gate:
        hopper_ptx(one_node._norm_kernel, EPS=1e-5, MOMENTUM=0.1, **walk)
        absent = dict.fromkeys(("weight", "bias", "running_mean", "running_var", "x", "z"))
        hopper_ptx(one_node._norm_kernel, EPS=1e-5, MOMENTUM=0.1, **absent, **walk)
        hopper_ptx(one_node._norm_backward_kernel, **walk)
