"""Generates the tables in README and docs from the registry and from `benchmarks/results/*.csv`.

A table is between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. `--check` writes nothing, and fails on stale tables.
"""

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import passes
from gpu import GPU_TARGETS, SHARE_OF_COPY
from tax import CPU_TARGETS, Target

import senet
from senet.bench.candidates import CANDIDATES
from senet.comparison.statistics import Interval, verdict
from senet.cost.count import model_cost
from senet.cost.paper import UNITS, compared, numbered_notes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(file: str) -> list[dict[str, str]]:
    """The rows of a results file; empty if nothing has been measured."""
    if not (RESULTS / file).exists():
        return []
    with (RESULTS / file).open(newline="") as handle:
        return list(csv.DictReader(handle))


def latest(rows: list[dict[str, str]], *keys: str) -> list[dict[str, str]]:
    """The last row for each combination of ``keys``: results are appended, so the last one is the newest."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def zoo() -> str:
    rows = []
    for name in senet.list_models():
        spec = senet.model_spec(name)
        if spec.se is not None:
            continue
        plain, se = model_cost(name), model_cost(spec.twin)
        rows.append(
            [
                f"`{name}`, `{spec.twin}`",
                spec.stride,
                str(spec.input_size),
                f"{plain.params / 1e6:.2f} → {se.params / 1e6:.2f}",
                f"{plain.mult_adds / 1e9:.3f} → {se.mult_adds / 1e9:.3f}",
            ]
        )
    header = ["plain, with SE", "stride in", "image size", "parameters, M", "multiply-adds, G"]
    return markdown(header, rows)


def published_costs() -> str:
    """Every complexity in the paper next to ours, followed by the reasons for those that cannot be reproduced."""
    figures = compared()
    notes = numbered_notes(figures)
    rows = []
    for figure in figures:
        row, (printed, ours, difference) = figure.row, figure.cells()
        mark = f" ({notes[figure.note]})" if figure.note else ""
        rows.append([row.table, row.name, f"`{row.model}`", UNITS[figure.quantity], printed, ours, difference + mark])
    header = ["source", "network", "here", "quantity", "printed", "counted", "difference"]
    reasons = "\n".join(
        textwrap.fill(f"{number}. {note[0].upper()}{note[1:]}.", 120, subsequent_indent="   ")
        for note, number in notes.items()
    )
    return f"{markdown(header, rows)}\n\n{reasons}"


def against_timm() -> str:
    rows = latest(rows_of("against_timm.csv"), "mode", "numerator", "denominator")
    header = ["ResNet-50, CPU", "time ratio, median (quartiles)", "target"]
    return markdown(
        header,
        [
            [
                f"{row['mode']}, batch {row['batch']}: {row['numerator']} ÷ {row['denominator']}",
                f"{float(row['ratio']):.3f} ({float(row['q25']):.3f}–{float(row['q75']):.3f})",
                f"≤ {row['target']}" if row["target"] else "—",
            ]
            for row in rows
        ],
    )


def slowest_loads() -> dict[str, dict[str, str]]:
    """Transform → its row with the lower ratio, which compares with the faster of torchvision's two variants."""
    slowest: dict[str, dict[str, str]] = {}
    for row in latest(rows_of("loader.csv"), "transform", "torchvision_on"):
        name = row["transform"]
        if name not in slowest or float(row["ratio"]) < float(slowest[name]["ratio"]):
            slowest[name] = row
    return slowest


def loader() -> str:
    header = ["transform", "files", "images/s, senet", "images/s, torchvision", "ratio, median (quartiles)"]
    return markdown(
        header,
        [
            [
                name,
                row["files"].replace("x", "×"),
                f"{float(row['senet_per_s']):,.0f}",
                f"{float(row['torchvision_per_s']):,.0f}",
                f"{float(row['ratio']):.2f} ({float(row['ratio_q25']):.2f}–{float(row['ratio_q75']):.2f})",
            ]
            for name, row in slowest_loads().items()
        ],
    )


def cifar10() -> str:
    rows = rows_of("cifar10_jpeg_compare.csv")
    runs = [row for row in rows if row["row"] == "run"]
    means = [row for row in rows if row["row"] == "mean"]
    (difference,) = [row for row in rows if row["row"] == "difference"]

    def interval(row: dict[str, str]) -> str:
        return f"{float(row['val_error']):.2f} ± {float(row['val_error_half_width_95']):.2f}"

    table = [
        [
            f"`{row['model']}`",
            f"{int(row['parameters']):,}",
            f"{int(row['mult_adds']) / 1e6:.2f}",
            ", ".join(f"{float(run['val_error']):.2f}" for run in runs if run["model"] == row["model"]),
            interval(row),
        ]
        for row in reversed(means)
    ]
    signed = ("" if float(difference["val_error"]) < 0 else "+") + interval(difference)
    table.append(["SE minus plain, paired by seed", "", "", "", signed.replace("-", "−")])
    epochs = runs[0]["epochs"]
    header = ["network", "parameters", "multiply-adds, M", f"error after {epochs} epochs, %, by seed", "mean ± 95 %"]
    found = Interval(float(difference["val_error"]), float(difference["val_error_half_width_95"]), len(runs) // 2)
    return f"{markdown(header, table)}\n\nVerdict of `senet compare`: {verdict(found)}."


NOT_MEASURED = "not measured"
TAX_KEYS = ("mode", "batch", "of", "numerator", "denominator")


def spread(row: dict[str, str]) -> str:
    """The ratio, with its quartiles for times; bytes have none."""
    quartiles = f" ({float(row['q25']):.3f}–{float(row['q75']):.3f})" if row["of"] == "time" else ""
    return f"{float(row['ratio']):.3f}{quartiles}"


def tax() -> str:
    """The targets of the zero tax and the measurements, on CPU and GPU."""
    lines = []
    for where, file, targets in (("CPU", "tax.csv", CPU_TARGETS), ("GPU", "gpu_tax.csv", GPU_TARGETS)):
        rows = rows_of(file)
        for target in targets:
            lines += target_lines(where, target, [row for row in rows if _is_of(row, target)])
    return markdown(["ResNet-50", "batch", "measured", "target", "ratio of"], lines)


def _is_of(row: dict[str, str], target: Target) -> bool:
    """Whether a row belongs to a target; earlier rows may be of candidates that no longer exist."""
    known = row["numerator"] in target.numerators and row["denominator"] in target.denominators
    return row["what"] == target.what and known


def target_lines(where: str, target: Target, rows: list[dict[str, str]]) -> list[list[str]]:
    limit, what = f"≤ {target.limit:.2f}", f"{where}, {target.what}"
    newest = latest(rows, "batch")  # only by batch, because the fastest engine may differ between runs
    return [
        [what, row["batch"], spread(row), limit, f"`{row['numerator']}` ÷ `{row['denominator']}`"]
        for row in sorted(newest, key=lambda row: int(row["batch"]))
    ] or [[what, "", NOT_MEASURED, limit, ""]]


def headline() -> str:
    """The five rows of the table in the README."""
    tax_rows = {(row["what"], row["batch"]): row for row in latest(rows_of("tax.csv"), "what", "batch")}
    accelerated_rows = {
        (row["model"], row["what"], row["engine"], row["batch"]): row
        for row in latest(rows_of("accelerate.csv"), "model", "what", "engine", "batch")
    }
    peer = tax_rows["inference, SE here ÷ the fastest peer's SE", "1"]
    engine = {"openvino-se": "OpenVINO", "onnxruntime-se": "ONNX Runtime", "timm-se-compiled": "timm, compiled"}
    lower = {
        "training step, batch 8: SE-ResNet-50 in senet ÷ ResNet-50 in PyTorch": tax_rows[
            "train step, SE ÷ plain eager", "8"
        ],
        "inference, batch 1: SE-ResNet-50 ÷ ResNet-50, both accelerated": tax_rows[
            "inference, SE ÷ plain, both accelerated", "1"
        ],
        f"inference, batch 1: SE-ResNet-50 in senet ÷ in {engine[peer['denominator']]}, the fastest peer": peer,
        "inference, batch 8: timm's `seresnet50` after `accelerate` ÷ before": accelerated_rows[
            "timm:seresnet50", "inference", "eager", "8"
        ],
    }
    load = slowest_loads()["train 224"]
    load_ratio = spread({"of": "time", "ratio": load["ratio"], "q25": load["ratio_q25"], "q75": load["ratio_q75"]})
    return markdown(
        ["measured on a CPU", "ratio (quartiles)", "better"],
        [[what, spread(row | {"of": "time"}), "lower"] for what, row in lower.items()]
        + [["JPEG images loaded per second, 224×224 training crops: senet ÷ torchvision", load_ratio, "higher"]],
    )


def pass_counts() -> str:
    """Feature maps read and written by the tail of a residual block in training."""
    forms = {
        "without SE, one operation at a time": passes.PLAIN,
        "with SE, one operation at a time": passes.EAGER,
        "**with SE, fused into sweeps**": passes.SWEEPS,
    }
    counts = {name: passes.transfers(form) for name, form in forms.items()}
    lines = [
        [name, str(forward), str(backward), str(forward + backward)] for name, (forward, backward) in counts.items()
    ]
    return markdown(["norm, SE, add, ReLU", "forward", "backward", "total"], lines)


def engines(file: str) -> str:
    """The cost of SE on each engine: time with SE ÷ time without."""
    rows = [row for row in rows_of(file) if (row["of"], row["layout"]) == ("time", "channels_last")]
    rows = latest(rows, *TAX_KEYS)
    settings = list(dict.fromkeys((row["mode"], row["batch"]) for row in rows))
    found = {(row["mode"], row["batch"], row["numerator"], row["denominator"]): row for row in rows}
    lines = []
    for name, candidate in CANDIDATES.items():
        if candidate.twin is not None:
            cells = [found.get((*setting, name, candidate.twin)) for setting in settings]
            if any(cells):
                pair = f"`{name}` ÷ `{candidate.twin}`"
                lines.append([pair, *(spread(row) if row else "—" for row in cells)])
    header = ["with SE ÷ without", *(f"{mode}, batch {batch}" for mode, batch in settings)]
    return markdown(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."


def gpu_bandwidth() -> str:
    """Each sweep's fraction of a copy's bandwidth, for the feature maps of ResNet-50's stages."""
    rows = latest(rows_of("gpu_bandwidth.csv"), "sweep", "shape")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    found = {(row["sweep"], row["shape"]): row["share_of_copy"] for row in rows}
    lines = [
        [f"`{sweep}`", *(f"{float(found[sweep, shape]):.2f}" if (sweep, shape) in found else "—" for shape in shapes)]
        for sweep in dict.fromkeys(row["sweep"] for row in rows)
    ]
    header = [f"fraction of copy bandwidth (target ≥ {SHARE_OF_COPY})", *(shape.replace("x", "×") for shape in shapes)]
    return markdown(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."


def ratio_of(row: dict[str, str] | None) -> str:
    """A time ratio with its quartiles, or a dash if it was not measured."""
    return f"{float(row['ratio']):.2f} ({float(row['q25']):.2f}–{float(row['q75']):.2f})" if row else "—"


def accelerated() -> str:
    """Networks of other libraries after `senet.accelerate` ÷ before."""
    rows = latest(rows_of("accelerate.csv"), "model", "what", "engine", "batch")
    found = {(row["model"], row["what"], row["engine"], row["batch"]): row for row in rows}
    columns = [(*key, batch) for key in (("inference", "eager"), ("inference", "compiled")) for batch in ("1", "8")]
    columns.append(("train", "eager", "8"))
    first = {"inference": ("inference", "eager", "1"), "training": ("train", "eager", "8")}
    lines = [
        [
            f"`{name}`",
            *(ratio_of(found.get((name, *column))) for column in columns),
            *(found.get((name, *column), {}).get("first_call_s") or "—" for column in first.values()),
        ]
        for name in dict.fromkeys(row["model"] for row in rows)
    ]
    header = [
        "after ÷ before",
        *(f"{what}, {engine}, batch {batch}" for what, engine, batch in columns),
        *(f"first call, {mode}, s" for mode in first),
    ]
    return markdown(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."


def projections() -> str:
    """A gate before a 1×1 convolution: applied to the weights ÷ applied to the feature map."""
    rows = latest(rows_of("projections.csv"), "channels", "outputs", "side", "batch")
    found = {(row["channels"], row["outputs"], row["side"], row["batch"]): row for row in rows}
    lines = [
        [f"{c} → {o}, {side}×{side}", *(ratio_of(found.get((c, o, side, batch))) for batch in ("1", "8"))]
        for c, o, side in dict.fromkeys(key[:3] for key in found)
    ]
    header = ["gate in the weights ÷ on the feature map", "batch 1", "batch 8"]
    return markdown(header, lines) if lines else f"{NOT_MEASURED.capitalize()}."


def convolutions() -> str:
    """Our convolutions and FC layers for inference ÷ PyTorch's, where ours are used."""
    rows = [row for row in latest(rows_of("convolutions.csv"), "what", "batch") if row["used"] == "1"]
    found = {(row["what"], row["batch"]): row for row in rows}
    lines = [
        [what, method, *(ratio_of(found.get((what, batch))) for batch in ("1", "8"))]
        for what, method in dict.fromkeys((row["what"], row["method"]) for row in rows)
    ]
    return markdown(["senet ÷ PyTorch", "method", "batch 1", "batch 8"], lines)


def allocator() -> str:
    """Training steps of networks in separate processes that keep freed memory or do not."""
    rows = latest(rows_of("allocator.csv"), "numerator", "denominator")
    lines = [
        [
            f"`{row['numerator']}` ÷ `{row['denominator']}`",
            spread(row | {"of": "time"}),
            f"{int(row['faults_of_numerator']):,}",
            f"{int(row['peak_mb_of_numerator']):,} MB",
        ]
        for row in rows
    ]
    return markdown(["ratio of", "time", "page faults per step, numerator", "peak memory, numerator"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "zoo": zoo,
    "published_costs": published_costs,
    "against_timm": against_timm,
    "loader": loader,
    "cifar10": cifar10,
    "passes": pass_counts,
    "headline": headline,
    "tax": tax,
    "tax_engines": lambda: engines("tax.csv"),
    "gpu_engines": lambda: engines("gpu_tax.csv"),
    "gpu_bandwidth": gpu_bandwidth,
    "accelerated": accelerated,
    "projections": projections,
    "allocator": allocator,
    "convolutions": convolutions,
}


def fill(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
        return f"<!-- begin: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: (\w+) -->\n.*?<!-- end: \1 -->", replace, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = fill(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new)
    if stale:
        print(("stale: " if args.check else "written: ") + ", ".join(stale))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
