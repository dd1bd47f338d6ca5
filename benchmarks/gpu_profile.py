"""Where the time of a step on a GPU goes: kernels, launches, and idle time of a few candidates.

    python benchmarks/gpu_profile.py [--batch 256] [--mode train] [--candidates NAME …] [--output FOLDER]

Prints one line per candidate (wall-clock time, time in kernels, launches) and writes the table of its kernels to
gpu_profile_<mode>_<batch>_<candidate>.txt.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from senet.bench.candidates import CANDIDATES, Runner, Setting, build, make_twins

DEFAULTS = {
    "train": ["plain-eager", "plain-accelerated", "se-accelerated"],
    "inference": ["plain-eager", "se-accelerated"],
}


def wall_ms(runner: Runner, steps: int = 5) -> float:
    """Median wall-clock time of a step, in milliseconds."""
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        runner.run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def examine(name: str, setting: Setting, folder: Path) -> None:
    torch.compiler.reset()
    runner = build(CANDIDATES[name], setting, make_twins(setting))
    for _ in range(3):
        runner.run()
    wall = wall_ms(runner)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        runner.run()
        torch.cuda.synchronize()
    averages = found.key_averages()
    kernels = [event for event in averages if event.device_type == torch.autograd.DeviceType.CUDA]
    busy, launches = sum(e.self_device_time_total for e in kernels) / 1e3, sum(e.count for e in kernels)
    print(f"{setting.mode} {setting.batch} {name}: {wall:.2f} ms, in kernels {busy:.2f} ms, {launches} launches")
    table = averages.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=90)
    (folder / f"gpu_profile_{setting.mode}_{setting.batch}_{name}.txt").write_text(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="se_resnet50")
    parser.add_argument("--mode", choices=DEFAULTS, default="train")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--candidates", nargs="+")
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    shape = (options.batch, options.size, options.dtype, "channels_last", "cuda")
    for name in options.candidates or DEFAULTS[options.mode]:
        examine(name, Setting(options.model, options.mode, *shape), options.output)


if __name__ == "__main__":
    main()
