"""The last 1×1 convolution of a block at inference, with the tail in its epilogue, as one Triton kernel.

out = act(gate·(W·h + b) + shortcut). The gate is known before the convolution runs, because average pooling commutes
with a 1×1 convolution. So the output of the convolution itself is never written and read again. In channels_last, the
convolution is a matrix product with N·S rows.

At the sizes of a ResNet, this product is closer to memory-bound than to compute-bound (28 operations per byte in the
second stage of ResNet-50, 228 in the last). Two things matter: the shortcut is loaded while the product runs, and
column blocks that share rows of h run together and find them in L2.
"""

# Triton evaluates annotations, so only the constexpr arguments of a kernel have one. By convention, they are uppercase.
# mypy: disallow-incomplete-defs=False
# ruff: noqa: N803, N806

from math import gcd

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from senet.errors import InputError
from senet.ops.triton_tiles import tuned


def _blocks(rows: int, out: int, inner: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_O": out, "BLOCK_C": inner}, num_warps=warps, num_stages=stages)


_TUNED = tuned(
    [_blocks(64, 128, 64, 8, 3), _blocks(64, 64, 64, 4, 3), _blocks(64, 128, 64, 4, 3), _blocks(128, 128, 64, 8, 3)],
    {"BLOCK_M": 32, "BLOCK_O": 16, "BLOCK_C": 16},
    ["C", "O", "PRECISION", "bucket"],
)


@_TUNED
@triton.jit(do_not_specialize=["M", "S", "C", "O", "bucket"])
def _gated_kernel(
    h, weight, bias, gate, shortcut, out, M, S, C, O, bucket,  # noqa: E741
    C_VECTOR: tl.constexpr, O_VECTOR: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Multiply rows m of h (M, C) by rows o of weight (O, C); row m belongs to sample m // S of gate (N, O)."""
    # This form tells the compiler how the rows are aligned, which enables 16-byte accesses.
    C = (C // C_VECTOR) * C_VECTOR
    O = (O // O_VECTOR) * O_VECTOR  # noqa: E741
    # GROUP blocks of rows with all their columns, then the next group: h and weight are reread from L2.
    m_blocks = tl.cdiv(M, BLOCK_M)
    in_group = GROUP * tl.cdiv(O, BLOCK_O)
    pid = tl.program_id(0)
    first_m = pid // in_group * GROUP
    height = tl.minimum(m_blocks - first_m, GROUP)
    m_block = first_m + pid % in_group % height
    m = tl.arange(0, BLOCK_M)
    o = pid % in_group // height * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_C)
    start = m_block * BLOCK_M
    in_m = start + m < M
    in_o = o < O
    inside = in_m[:, None] & in_o[None, :]

    here = start.to(tl.int64) * O + (m[:, None] * O + o[None, :])
    if shortcut is not None:  # the load is issued first; its value is needed last
        residual = tl.load(shortcut + here, mask=inside, other=0.0)
    h_here = h + start.to(tl.int64) * C + (m[:, None] * C + c[None, :])
    w_here = weight + (o[None, :] * C + c[:, None])
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for first in range(0, C, BLOCK_C):
        in_c = first + c < C
        x = tl.load(h_here, mask=in_m[:, None] & in_c[None, :], other=0.0)
        w = tl.load(w_here, mask=in_c[:, None] & in_o[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        h_here += BLOCK_C
        w_here += BLOCK_C
    total += tl.load(bias + o, mask=in_o, other=0.0).to(tl.float32)[None, :]

    # A tile covers one sample, or a few if maps are small: a row of gates per sample takes fewer registers than a tile.
    sample = (start + m) // S
    for n in range(start // S, (tl.minimum(start + BLOCK_M, M) - 1) // S + 1):
        row = tl.load(gate + n * O + o, mask=in_o, other=0.0).to(tl.float32)
        total *= tl.where((sample == n)[:, None], row[None, :], 1.0)
    if shortcut is not None:
        total += residual.to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN propagates, as in torch.relu
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


def gated_pointwise(
    h: Tensor, weight_oc: Tensor, bias_o: Tensor, gate_no: Tensor, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """act(gate·(W·h + b) + shortcut): (N, C, *S) → (N, O, *S) in the dtype of ``h``, channels_last.

    W is (O, C), b is (O,), the gate is (N, O); sums are float32. A float32 product has float32 precision, unless
    PyTorch allows TF32 for its own products on CUDA (``torch.backends.cuda.matmul``). A shortcut that is not
    channels_last is copied first.

    Raises:
        InputError: ``h`` is float64.
    """
    if h.dtype == torch.float64:
        raise InputError("gated_pointwise: there is no Triton kernel for float64; use the backend 'reference'")
    h_nsc = h.movedim(1, -1).contiguous()
    c, o = h_nsc.shape[-1], weight_oc.shape[0]
    out_nso = torch.empty((*h_nsc.shape[:-1], o), dtype=h.dtype, device=h.device)
    out = out_nso.movedim(-1, 1)
    if out.numel() == 0:
        return out
    rows = h_nsc.numel() // c
    shortcut_nso = None if shortcut is None else shortcut.movedim(1, -1).contiguous()

    def programs(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(o, meta["BLOCK_O"]),)

    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    with torch.cuda.device_of(h):
        _gated_kernel[programs](
            h_nsc, weight_oc.to(h.dtype).contiguous(), bias_o.contiguous(), gate_no.contiguous(), shortcut_nso, out_nso,
            rows, rows // h.shape[0], c, o, rows.bit_length() // 2, gcd(c, 16), gcd(o, 16), relu, precision, 8,
        )  # fmt: skip
    return out
