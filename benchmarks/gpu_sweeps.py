"""The kernels on a GPU: their error relative to float64, and their fraction of the bandwidth of a device copy."""

import copy
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from senet import SqueezeExcite
from senet.ops.dispatch import Sweeps, sweeps_of
from senet.ops.reference import FullyConnected
from senet.ops.tail import definitions
from senet.ops.tail.norms import norm_of
from senet.ops.tail.tail import tail

# The feature maps at the end of ResNet-50's stages: channels, side.
STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
# Odd numbers of channels, one pixel, one image, three and five images, and two of the stages.
CHECKED = ((3, 5, 7, 9), (2, 64, 1, 1), (1, 257, 14, 14), (5, 2048, 7, 7), (16, 256, 56, 56))
# Allowed errors relative to the largest value: those of float32 sums and, for maps, of one rounding to their dtype.
TABLES_ALLOWED = 1e-5
_HALVES = {dtype: 0.51 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
MAPS_ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, **_HALVES}
# Feature maps read and written: u; u, shortcut → out; dout, out, u → g; g, u → du. Eleven in total.
TRAFFIC = {"moments": 1, "affine": 3, "affine_backward": 4, "moments_backward": 3}
COPY_BYTES = 2**30

Bench = Callable[[Callable[[], object]], float]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments for each sweep: u with mean 3 and standard deviation 2, tables of magnitude about 1."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def a_map(mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=wide) * deviation + mean
        return drawn.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)

    def a_table() -> Tensor:
        return torch.randn(shape[:2], generator=generator, device=device, dtype=wide)

    u, shortcut, dout = a_map(3.0, 2.0), a_map(), a_map()
    m, a, b = u.to(wide).mean((2, 3)), a_table(), a_table()
    out = torch.relu(a_map())
    return {
        "moments": (u,),
        "affine": (u, m, a, b, shortcut, True),
        "affine_backward": (dout, out, u, m),
        "moments_backward": (dout, u, m, a, a_table(), a_table()),
    }


def errors(run: Sweeps, shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> dict[str, float]:
    """Each sweep's largest error relative to its definition in float64, divided by the allowed error."""
    calls = arguments(shape, dtype, last, device)
    calls["mean"] = calls["moments"]
    return {name: _error(getattr(run, name), getattr(definitions, name), args) for name, args in calls.items()}


def product_error(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> dict[str, float]:
    """The same for the 1×1 convolution with gate, shortcut, and ReLU of inference; it does not support float64."""
    if dtype == torch.float64:
        return {}
    from senet.ops.conv.triton import gated_pointwise

    u, _, a, b, shortcut, _ = arguments(shape, dtype, last, device)["affine"]
    weight = torch.linspace(-1, 1, u.shape[1] * 24, device=device, dtype=dtype).sin().reshape(24, -1)
    gate, bias, other = a.sigmoid()[:, :1].expand(-1, 24).contiguous(), b[0, :1].expand(24), shortcut[:, :1]
    args = (u, weight, bias, gate, other.expand(-1, 24, -1, -1), False)
    return {"gated_pointwise": _error(gated_pointwise, _product, args)}


def _product(h: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, shortcut: Tensor, relu: bool) -> Tensor:
    y = torch.einsum("nchw,oc->nohw", h, weight) + bias[:, None, None]
    y = gate[:, :, None, None] * y + shortcut
    return torch.relu(y) if relu else y


def tail_error(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str) -> dict[str, float]:
    """The same for the whole tail with batch norm as one autograd node: output and gradients, in the L2 norm.

    Where the ReLU is all but undecided, rounding decides. One such position among the 10⁷ of a feature map is an error
    of 4·10⁻⁴ in the gradient, whatever computes it, so these positions get no gradient.
    """
    if dtype == torch.float64 or shape[0] * math.prod(shape[2:]) < 8:  # normalizing two values leaves only rounding
        return {}
    u, _, _, _, shortcut, _ = arguments(shape, dtype, last, device)["affine"]
    allowed = 5e-5 if dtype == torch.float32 else 2.0 * torch.finfo(dtype).eps
    dout = torch.randn(u.shape, generator=torch.Generator(device).manual_seed(3), device=device).to(torch.bfloat16)
    found = {}
    for name, gated in (("tail", True), ("norm_relu", False)):
        torch.manual_seed(0)
        parts = nn.ModuleList([nn.BatchNorm2d(shape[1]), SqueezeExcite(shape[1])][: 1 + gated]).to(device)
        with torch.no_grad():
            parts[0].bias.normal_()  # for a single image, the squeeze is the bias
        exact = copy.deepcopy(parts).double()
        other, wide = (shortcut, shortcut.double()) if gated else (None, None)
        with torch.no_grad():
            before = _tail(exact, u.double(), wide, False, "reference")
        decided = dout.masked_fill(before.abs() < 1e-5 * before.abs().max(), 0)
        got = _step(parts, u, other, "triton", decided)
        truth = _step(exact, u.double(), wide, "reference", decided)
        errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, truth, strict=True)]
        found[name] = max(float("inf") if math.isnan(e) else e for e in errors) / allowed
    return found


def _tail(parts: nn.ModuleList, u: Tensor, shortcut: Tensor | None, relu: bool, backend: str) -> Tensor:
    gate = None
    if len(parts) > 1:
        fc1, fc2 = parts[1].fc1, parts[1].fc2
        gate = FullyConnected(fc1.weight, fc1.bias, fc2.weight, fc2.bias, "sigmoid")
    return tail(u, norm_of(parts[0]), gate, shortcut, relu, backend)


def _step(parts: nn.ModuleList, u: Tensor, shortcut: Tensor | None, backend: str, dout: Tensor) -> list[Tensor]:
    u = u.detach().requires_grad_()
    out = _tail(parts, u, shortcut, True, backend)
    return [out, *torch.autograd.grad(out, [u, *parts.parameters()], dout.to(out.dtype))]


def _error(call: Callable[..., Any], definition: Callable[..., Any], args: tuple[Any, ...]) -> float:
    exact_args = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    got, exact = call(*args), definition(*exact_args)
    pairs = zip(*((value if isinstance(value, tuple) else (value,)) for value in (got, exact)), strict=True)
    return max(_share(a, b, args[0].dtype) for a, b in pairs)


def _share(found: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Error divided by allowed error; infinite for NaN and for a map whose dtype differs from that of the input."""
    is_map = found.ndim > 2
    if is_map and found.dtype != dtype:
        return float("inf")
    allowed = MAPS_ALLOWED[dtype] if is_map or dtype == torch.float64 else TABLES_ALLOWED
    error = (found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float("inf") if error.isnan() else (error / allowed).item()


def check(run: Sweeps, device: str, shapes: tuple[tuple[int, ...], ...] = CHECKED) -> list[dict[str, Any]]:
    """One row per kernel and dtype, for the worst shape and layout; ``share_of_allowed`` above 1 is a failure."""
    return _worst(
        _where(name, shape, dtype, last) | {"share_of_allowed": share}
        for shape in shapes
        for dtype in MAPS_ALLOWED
        for last in (True, False)
        for name, share in errors(run, shape, dtype, last, device).items()
    )


def check_every_tile(device: str, shapes: tuple[tuple[int, ...], ...] = CHECKED) -> list[dict[str, Any]]:
    """The same for each tile configuration of the Triton kernels, in parallel processes.

    Almost all of the time is compilation. The compiled kernels are cached on disk for the timings that follow.
    """
    work = [(shape, str(dtype), last, device) for shape in shapes for dtype in MAPS_ALLOWED for last in (True, False)]
    with multiprocessing.get_context("spawn").Pool(min(len(work), max(1, (os.cpu_count() or 1) * 3 // 4))) as pool:
        return _worst(row for rows in pool.imap_unordered(_check_tiles, work, chunksize=1) for row in rows)


def _check_tiles(work: tuple[tuple[int, ...], str, bool, str]) -> list[dict[str, Any]]:
    shape, dtype_name, last, device = work
    dtype = getattr(torch, dtype_name.removeprefix("torch."))
    from senet.ops.conv import triton as triton_gemm
    from senet.ops.tail import triton as triton_kernels
    from senet.ops.tail import triton_moments

    run, rows = sweeps_of("triton"), []
    kernels = [
        k
        for home in (triton_kernels, triton_moments, triton_gemm)
        for k in vars(home).values()
        if hasattr(k, "configs")
    ]
    tiles = {id(kernel): kernel.configs for kernel in kernels}
    for number in range(max(map(len, tiles.values()))):
        for kernel in kernels:  # a single configuration: nothing is autotuned while other processes compile
            kernel.configs = [tiles[id(kernel)][number % len(tiles[id(kernel)])]]
        found = errors(run, shape, dtype, last, device) | product_error(shape, dtype, last, device)
        found |= tail_error(shape, dtype, last, device)
        rows += [_where(name, shape, dtype, last) | {"share_of_allowed": share} for name, share in found.items()]
    return rows


def _worst(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        known = worst.setdefault((row["sweep"], row["dtype"]), row)
        if not known["share_of_allowed"] >= row["share_of_allowed"]:
            worst[row["sweep"], row["dtype"]] = row
    return list(worst.values())


def _where(name: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> dict[str, Any]:
    return {
        "sweep": name,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "channels_last" if last else "contiguous",
    }


def milliseconds(device: str) -> Bench:
    """A function that measures the median time of a call in ms: by CUDA events with a cold cache, or on the CPU."""
    if device.startswith("cuda"):
        return _by_events

    def by_clock(call: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e3 * sorted(times)[2]

    return by_clock


def _by_events(call: Callable[[], object]) -> float:
    """Flush the cache before each call; this also keeps the device busy while Python launches the call."""
    flushed = torch.empty(2**30, dtype=torch.uint8, device="cuda")  # about 250 µs
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(25)]
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[5:])


def copy_gb_per_s(device: str, bench: Bench) -> float:
    """Bandwidth of a copy of 1 GiB (4 MiB on a CPU): bytes read and written, divided by its time."""
    source = torch.zeros(COPY_BYTES if device.startswith("cuda") else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench(lambda: target.copy_(source)) / 1e6


def bandwidth(
    run: Sweeps, device: str, batch: int, dtype: torch.dtype, stages: tuple[tuple[int, int], ...] = STAGES
) -> Iterator[dict[str, Any]]:
    """One row per sweep and stage: GB/s (maps read and written), also relative to a copy on the same device."""
    bench = milliseconds(device)
    copy = copy_gb_per_s(device, bench)
    for channels, side in stages:
        shape = (batch, channels, side, side)
        for name, args in arguments(shape, dtype, True, device).items():
            call = getattr(run, name)
            call(*args)  # compiles and tunes
            elapsed = bench(lambda call=call, args=args: call(*args))  # type: ignore[misc]
            size = TRAFFIC[name] * args[0].nbytes
            yield _where(name, shape, dtype, True) | {
                "us": 1e3 * elapsed,
                "gb_per_s": size / elapsed / 1e6,
                "copy_gb_per_s": copy,
                "share_of_copy": size / elapsed / 1e6 / copy,
            }
