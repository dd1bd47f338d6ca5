"""All measurements on one GPU, in less than nine minutes: correctness, bandwidth, the SE tax, and peak memory.

    python benchmarks/gpu.py [--minutes 9] [--only checks sweeps train inference] [--batch 256] [--output FOLDER]
    python benchmarks/gpu.py --draw --output FOLDER     draws the figures from the rows, without measuring

The most informative measurements come first; those that do not fit into --minutes are dropped and listed. Rows are
written to gpu_checks.csv, gpu_bandwidth.csv, and gpu_tax.csv in --output. bfloat16, channels_last, ResNet-50 at 224
pixels.
"""

import argparse
import csv
import functools
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_sweeps
import torch
from common import RESULTS, append_row
from tax import FAST, OURS, Target, save
from torch._inductor.runtime.cache_dir_utils import cache_dir

from senet.bench.candidates import BASE, CANDIDATES, Setting, build, choose, make_twins
from senet.bench.figure import plot_tax
from senet.bench.files import write_numbers
from senet.bench.tax import Measured, measure
from senet.errors import InputError
from senet.ops.dispatch import sweeps_of
from senet.system.figures import new_figure, save_png

SHARE_OF_COPY = 0.85  # the target for each sweep
PLAIN_BEST = (BASE, "plain-compiled", "plain-accelerated")
GPU_TARGETS = (
    Target("train step, SE ÷ plain, both at their fastest", "train", OURS, PLAIN_BEST, 1.02),
    Target("inference, SE ÷ plain compiled", "inference", OURS, ("plain-compiled",), 1.02),
    Target("peak training memory, SE ÷ plain eager", "train", FAST, (BASE,), 1.00, of="peak"),
    Target("saved for backward, SE ÷ plain eager", "train", FAST, (BASE,), 1.01, of="saved"),
)
# The settings, the most informative first: (mode, batch, candidates).
OWN = "plain-*,se-accelerated"
TAXES = (
    ("train", 256, OWN),
    ("inference", 256, OWN),
    ("inference", 1, "plain-compiled,se-accelerated-graphs"),
    ("train", 32, OWN),
    ("train", 256, "timm-plain,timm-se"),
    ("inference", 256, "timm-*"),
    ("train", 256, "timm-*-compiled"),
    ("inference", 32, OWN),
    ("inference", 1, "timm-*"),
    ("train", 32, "timm-*"),
    ("inference", 32, "timm-*"),
)
PATIENCE = 100.0  # seconds that the preparation may take
PARTS = ("checks", "sweeps", "train", "inference")
# What torch.compile prepares in processes of their own, while the kernels are checked: (mode, batch, candidate).
COMPILED = (
    ("train", 256, "plain-compiled"),
    ("train", 256, "plain-accelerated"),
    ("train", 256, "se-accelerated"),
    ("inference", 256, "plain-compiled"),
    ("inference", 256, "plain-accelerated"),
    ("inference", 256, "se-accelerated"),
    ("inference", 1, "plain-compiled"),
    ("inference", 1, "se-accelerated-graphs"),
)
NETWORKS = "gpu_networks"  # .csv, .json and .png: every candidate's times, as `senet bench` writes them


class Budget:
    """The time limit of a run. Measurements that are expected to exceed it are dropped and listed."""

    def __init__(self, minutes: float, on_gpu: bool) -> None:
        self._end = time.monotonic() + 60 * minutes
        # Seconds, mostly for torch.compile; replaced by the time of the last measurement of the kind.
        self._guess = (
            {"checks": 50.0, "sweeps": 15.0, "train": 75.0, "inference": 45.0} if on_gpu else dict.fromkeys(PARTS, 0.0)
        )
        self.dropped: list[str] = []

    def took(self, kind: str, seconds: float) -> None:
        self._guess[kind] = seconds

    def allows(self, kind: str, what: str) -> bool:
        if time.monotonic() + self._guess[kind] < self._end:
            return True
        self.dropped.append(what)
        return False


class Preparation:
    """Compiles networks in parallel processes; the measurement finds the kernels in the caches of the compilers.

    A cold compilation of ResNet-50 takes more than a minute of one core. Each process has its share of the memory.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        chosen = [(m, b, c) for m, b, c in COMPILED if m in options.only and b in options.batch]
        words = ("--model", options.model, "--size", options.size, "--dtype", options.dtype, "--device", options.device)
        self._processes = {
            f"{mode}, batch {batch}, {name}": subprocess.Popen(
                [sys.executable, __file__, *map(str, words), "--compile-only", mode, str(batch), name],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for mode, batch, name in (chosen if options.prepare else ())
        }

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for what, process in self._processes.items():
            try:
                error = process.communicate(timeout=max(0.1, end - time.monotonic()))[1]
            except subprocess.TimeoutExpired:
                process.kill()
                error = process.communicate()[1] + f"\nnot ready after {seconds:.0f} s"
            if process.returncode:
                print(f"  preparing {what}: {error.strip().splitlines()[-1]}", flush=True)
        # Blocks that were timed while other processes used the device are chosen anew.
        for file in Path(cache_dir()).rglob("*.best_config"):
            file.unlink()


def compile_only(options: argparse.Namespace) -> None:
    """Run one step of one candidate, for the caches of the compilers."""
    mode, batch, name = options.compile_only
    setting = Setting(options.model, mode, int(batch), options.size, options.dtype, "channels_last", options.device)
    build(CANDIDATES[name], setting, make_twins(setting)).run()


def run_checks(options: argparse.Namespace, budget: Budget) -> int:
    """Check every kernel against float64; returns how many checks failed."""
    if not budget.allows("checks", "checks"):
        return 0
    wrong, every_tile = 0, options.backend == "triton" and options.device == "cuda"
    found = (
        gpu_sweeps.check_every_tile if every_tile else functools.partial(gpu_sweeps.check, sweeps_of(options.backend))
    )
    for row in found(options.device):
        bad = not row["share_of_allowed"] <= 1
        wrong += bad
        if bad:
            print(f"  wrong: {row}", flush=True)
        _append(options, "gpu_checks.csv", backend=options.backend, **_rounded(row))
    print(f"checks: {wrong} wrong results against float64", flush=True)
    return wrong


def run_sweeps(options: argparse.Namespace, budget: Budget) -> int:
    """Time the sweeps relative to a copy."""
    if not budget.allows("sweeps", "sweeps"):
        return 0
    dtype, run = getattr(torch, options.dtype), sweeps_of(options.backend)
    for row in gpu_sweeps.bandwidth(run, options.device, options.sweep_batch, dtype):
        print(f"  {row['sweep']:17} {row['shape']:15} {row['share_of_copy']:.3f} of a copy (target ≥ {SHARE_OF_COPY})")
        _append(options, "gpu_bandwidth.csv", backend=options.backend, **_rounded(row), target=SHARE_OF_COPY)
    return 0


def run_taxes(options: argparse.Namespace, budget: Budget) -> int:
    """Measure the tax of each setting that fits into the time; returns how many failed."""
    failed, everything = 0, list[Measured]()
    for mode, batch, patterns in TAXES:
        what = f"{mode}, batch {batch}, {patterns}"
        if mode not in options.only or batch not in options.batch or not budget.allows(mode, what):
            continue
        print(what, flush=True)
        start, shape = time.monotonic(), (batch, options.size, options.dtype, "channels_last", options.device)
        try:
            setting = Setting(options.model, mode, *shape, options.rounds, choose(patterns.split(",")))
            everything.append(measure(setting))
            save(everything[-1], GPU_TARGETS, str(options.output / "gpu_tax.csv"), at_commit=options.commit)
            write_numbers(options.output, everything, NETWORKS)
        except InputError as error:
            print(f"  {error}", flush=True)
            failed += 1
        except Exception:  # a failure on a new machine must not lose the rows of the other settings
            traceback.print_exc()
            failed += 1
        if options.device == "cuda":
            torch.cuda.empty_cache()
        budget.took(mode, time.monotonic() - start)
    return failed


def _append(options: argparse.Namespace, file: str, **row: Any) -> None:
    append_row(str(options.output / file), options.commit, **row)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}


def draw_bandwidth(rows: list[dict[str, str]], path: Path) -> None:
    """Fraction of a copy's bandwidth: a group of bars per stage, a bar per sweep, the target as a line."""
    latest = {(row["sweep"], row["shape"]): float(row["share_of_copy"]) for row in rows}
    shapes, names = list(dict.fromkeys(row["shape"] for row in rows)), list(gpu_sweeps.TRAFFIC)
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for index, (name, color) in enumerate(zip(names, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True)):
        places = [group + 0.2 * (index - 1.5) for group in range(len(shapes))]
        bars = axes.bar(places, [latest.get((name, s), 0.0) for s in shapes], 0.19, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=1)
    axes.axhline(SHARE_OF_COPY, color="0.15", linewidth=1.0, linestyle="--")
    axes.set_ylim(0, max(1.05, 1.1 * max(latest.values())))
    axes.set_xticks(range(len(shapes)), [shape.replace("x", "×") for shape in shapes])
    axes.set_ylabel("bandwidth ÷ that of a copy on the same device")
    axes.set_title(f"{rows[-1]['hardware'].rpartition('+ ')[2]}, {rows[-1]['dtype']}, channels_last", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_png(figure, path)


def draw(options: argparse.Namespace) -> None:
    """Draw both figures from the rows in this folder; without matplotlib, print how to draw them elsewhere."""
    bandwidth, networks = options.output / "gpu_bandwidth.csv", options.output / f"{NETWORKS}.json"
    try:
        if bandwidth.exists():
            with bandwidth.open(newline="") as handle:
                draw_bandwidth(list(csv.DictReader(handle)), bandwidth.with_suffix(".png"))
        if networks.exists():
            content = json.loads(networks.read_text())
            title = (
                f"{options.model} and its plain twin, {content['machine']['gpu'] or content['machine']['processor']}"
            )
            plot_tax(networks.with_suffix(".png"), [setting["rows"] for setting in content["settings"]], title)
    except ModuleNotFoundError as error:
        print(f"no figures: {error.name} is not installed; draw them with: gpu.py --draw --output {options.output}")


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1], help="batch sizes of the networks")
    parser.add_argument("--sweep-batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--model", default="se_resnet50")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton", help="the backend of the measured sweeps")
    parser.add_argument("--commit", help="the measured commit, if git is not available")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="compile in parallel processes during the checks")
    parser.add_argument("--compile-only", nargs=3, metavar=("MODE", "BATCH", "CANDIDATE"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.output = options.output.resolve()
    return options


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.draw:
        draw(options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found; nothing is measured", file=sys.stderr)
        return 2
    if options.compile_only:
        compile_only(options)
        return 0
    budget = Budget(options.minutes, options.device == "cuda")
    preparation, failed = Preparation(options), 0
    for part, measure_it in (("checks", run_checks), ("sweeps", run_sweeps)):
        if part in options.only and not failed:  # wrong kernels are not timed
            if part == "sweeps":
                preparation.wait(PATIENCE)
            try:
                failed = measure_it(options, budget)
            except Exception:  # a failure on a new machine must not lose the rows of the other parts
                traceback.print_exc()
                failed = 1
    preparation.wait(PATIENCE)
    failed += run_taxes(options, budget)
    draw(options)
    for what in budget.dropped:
        print(f"dropped for lack of time: {what}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
