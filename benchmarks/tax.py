"""The SE tax on the CPU, `se_resnet50` against `resnet50`: targets and measurements.

    python benchmarks/tax.py [--rounds 15] [--only train] [--processes 9]

Float32, 224×224, channels_last unless ``--layout`` says otherwise; a training step at batch size 8, inference at 1 and
8. The measurement is that of `senet bench` (senet.bench.tax): correctness first, then all candidates interleaved. Each
ratio becomes a row of results/tax.csv.

The addresses that the allocator chooses stay the same for a whole process and change a training step by a few percent
(NOTES.md). With ``--processes``, the row has the median and quartiles of the median ratios of that many processes.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import append_row

from senet.bench.candidates import BASE, CANDIDATES, Setting, choose
from senet.bench.tax import Measured, measure
from senet.errors import InputError

FILE = "tax.csv"
SHOWN = ("model", "mode", "batch", "size", "dtype", "layout", "device")


@dataclass(frozen=True)
class Target:
    """The fastest of ``numerators`` divided by the fastest of ``denominators`` must be at most ``limit``."""

    what: str
    mode: str
    numerators: tuple[str, ...]
    denominators: tuple[str, ...]
    limit: float
    of: str = "time"
    layout: str = "channels_last"


FAST, OURS = ("se-accelerated",), ("se-accelerated", "se-accelerated-compiled")
CPU_TARGETS = (
    Target("train step, SE ÷ plain eager", "train", FAST, (BASE,), 1.00),
    # The fair comparison, because accelerate makes the plain network faster, too.
    Target("train step, SE ÷ plain, both accelerated", "train", FAST, ("plain-accelerated",), 1.02),
    Target("saved for backward, SE ÷ plain eager", "train", FAST, (BASE,), 1.01, of="saved"),
    Target("train step, contiguous maps, SE ÷ plain eager", "train", FAST, (BASE,), 1.00, layout="contiguous"),
    Target("train step, accelerated within torch.compile ÷ alone", "train", OURS[1:], FAST, 1.02),
    Target("inference, SE ÷ plain compiled", "inference", OURS, ("plain-compiled",), 1.05),
    Target("inference, SE ÷ plain, both accelerated", "inference", FAST, ("plain-accelerated",), 1.05),
    Target("inference, accelerated within torch.compile ÷ alone", "inference", OURS[1:], FAST, 1.02),
    Target(
        "inference, SE here ÷ the fastest peer's SE",
        "inference",
        OURS,
        ("onnxruntime-se", "openvino-se", "timm-se-compiled"),
        0.95,
    ),
)


def pairs(measured: Measured, targets: tuple[Target, ...]) -> Iterator[dict[str, Any]]:
    """Every ratio of one setting: each candidate ÷ plain eager and ÷ its twin, and the ratios with a target."""
    names = [name for name in measured.timings if name != BASE]
    plain = {(name, BASE, "time"): ("", None) for name in names}
    twins = {(name, CANDIDATES[name].twin or BASE, "time"): ("", None) for name in names}
    sizes = {(name, BASE, of): ("", None) for of, sizes in _sizes(measured).items() for name in sizes if name != BASE}
    wanted: dict[tuple[str, str, str], tuple[str, float | None]] = plain | twins | sizes
    for target in targets:
        ours, theirs = (_fastest(measured, group) for group in (target.numerators, target.denominators))
        aims = (target.mode, target.layout) == (measured.setting.mode, measured.setting.layout)
        if aims and ours and theirs:
            wanted[ours, theirs, target.of] = (target.what, target.limit)
    for (numerator, denominator, of), (what, limit) in wanted.items():
        found = _ratio(measured, numerator, denominator, of)
        if found is not None:
            shared = {"of": of, "numerator": numerator, "denominator": denominator, "target": limit, "what": what}
            yield shared | dict(zip(("ratio", "q25", "q75"), found, strict=True))


def _sizes(measured: Measured) -> dict[str, dict[str, float]]:
    return {"saved": measured.saved_mb, "peak": measured.peak_mb}


def _fastest(measured: Measured, names: tuple[str, ...]) -> str | None:
    timed = [name for name in names if name in measured.timings]
    return min(timed, key=lambda name: measured.timings[name].median, default=None)


def _ratio(measured: Measured, numerator: str, denominator: str, of: str) -> tuple[float, float, float] | None:
    if of == "time":
        r = measured.ratio(numerator, denominator)
        return None if r is None else (r.median, r.q25, r.q75)
    sizes = _sizes(measured)[of]  # bytes have no spread
    return (sizes[numerator] / sizes[denominator],) * 3 if {numerator, denominator} <= sizes.keys() else None


def save(measured: Measured, targets: tuple[Target, ...], file: str, **more: Any) -> None:
    """Print the checks and the ratios, and append the ratios to ``file``."""
    setting = measured.setting
    for check in measured.checks:
        print(f"  {check}")
    for name, reason in measured.left_out.items():
        print(f"  {name}: {reason}")
    rounds = len(measured.timings[BASE].rounds)
    for row in pairs(measured, targets):
        numbers = {key: f"{row[key]:.4f}" for key in ("ratio", "q25", "q75")}
        reached = "" if row["target"] is None else f"   {row['what']}: target ≤ {row['target']:.2f}"
        print(f"  {row['of']:5} {row['numerator']} ÷ {row['denominator']}: {numbers['ratio']}{reached}")
        shown = {name: getattr(setting, name) for name in SHOWN}
        target = "" if row["target"] is None else row["target"]
        append_row(file, **more, **shown, rounds=rounds, **row | numbers | {"target": target})


# The columns of a row besides its setting and pair: the numbers, the target of the pair, and what `append_row` adds.
ADDED = ("ratio", "q25", "q75", "target", "what", "date", "commit", "hardware", "python", "torch", "command")


def over_processes(count: int, options: list[str], file: str) -> int:
    """Measure in ``count`` successive processes, and append the median of each ratio's medians to ``file``.

    The fastest engine, which represents a target, may differ between processes: ratios of the majority are kept.
    """
    found: dict[tuple[tuple[str, str], ...], list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            print(f"process {i + 1} of {count}", flush=True)
            path = Path(folder, f"{i}.csv")
            code = subprocess.run([sys.executable, __file__, *options, "--file", str(path)], check=False).returncode
            if code:
                return code
            with path.open(newline="") as handle:
                for row in csv.DictReader(handle):
                    key = tuple((name, x) for name, x in row.items() if name not in ADDED)
                    found.setdefault(key, []).append(row)
    print(f"median (quartiles) of {count} processes")
    for key, rows in found.items():
        if 2 * len(rows) <= count:
            continue
        setting = dict(key)
        for name in ("target", "what"):
            setting[name] = statistics.mode(row[name] for row in rows)
        q25, ratio, q75 = statistics.quantiles([float(row["ratio"]) for row in rows], n=4, method="inclusive")
        numbers = {"ratio": f"{ratio:.4f}", "q25": f"{q25:.4f}", "q75": f"{q75:.4f}"}
        print(f"  {setting['mode']} {setting['of']:5} {setting['numerator']} ÷ {setting['denominator']}: ", end="")
        print(f"{ratio:.4f} ({q25:.4f}–{q75:.4f}) {setting['what']}", flush=True)
        append_row(file, **setting, **numbers)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="se_resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--only", choices=("train", "inference"))
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--candidates", default="*")
    parser.add_argument("--file", default=FILE, help="a file in benchmarks/results, or a path")
    parser.add_argument("--processes", type=int, default=1, help="report the median over this many processes")
    args = parser.parse_args(arguments)
    if args.processes > 1:
        passed = ("rounds", "model", "size", "layout", "candidates", *(["only"] if args.only else []))
        options = [word for name in passed for word in (f"--{name}", str(getattr(args, name)))]
        return over_processes(args.processes, options, args.file)
    for mode, batch in (("train", 8), ("inference", 1), ("inference", 8)):
        if args.only not in (None, mode):
            continue
        chosen = choose(args.candidates.split(","))
        print(f"{args.model}, {mode}, batch {batch}", flush=True)
        try:
            setting = Setting(args.model, mode, batch, args.size, layout=args.layout, rounds=args.rounds)
            measured = measure(replace(setting, candidates=chosen))
        except InputError as error:
            print(error, file=sys.stderr)
            return 1
        save(measured, CPU_TARGETS, args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
