"""The SE tax: what is compared, that it is checked first, and what is left when it is stopped."""

import csv
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import senet
from helpers.messages import assert_said, one_line
from helpers.networks import own_registry
from senet.bench import checks, stages, tax
from senet.bench.candidates import BASE, CANDIDATES, Setting, build, choose, make_twins
from senet.bench.figure import plot_tax
from senet.bench.files import write_tax
from senet.bench.memory import saved_for_backward
from senet.bench.tax import CheckError, Measured, checked_setting, measure, measure_into
from senet.system.timing import Timing, interleaved, ratio

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EAGER = choose(["se-reference"])
TINY = Setting("se_resnet8", "inference", 2, 16, rounds=2, candidates=EAGER)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_se_candidate_has_a_plain_twin_that_comes_along():
    for candidate in CANDIDATES.values():
        assert (candidate.twin is None) == (candidate.network == "plain")
        if candidate.twin:
            twin = CANDIDATES[candidate.twin]
            assert twin.network == "plain"
            assert set(candidate.modes) <= set(twin.modes)
    assert choose(["onnxruntime-se"]) == (BASE, "onnxruntime-plain", "onnxruntime-se")
    assert choose(["*"]) == tuple(CANDIDATES)
    with pytest.raises(senet.InputError, match="'se-slow'"):
        choose(["se-slow"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sleep"}, "--mode 'sleep'"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"batch": 0}, "--batch 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"model": "se_resnet9"}, "did you mean"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(senet.InputError, match=message):
        checked_setting(replace(TINY, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without one")
def test_no_cuda_device_is_said():
    with pytest.raises(senet.InputError, match="no CUDA device"):
        checked_setting(replace(TINY, device="cuda"))


def test_the_plain_name_means_its_se_twin():
    assert checked_setting(replace(TINY, model="resnet8")).model == "se_resnet8"


def test_training_one_value_a_channel_is_one_clear_line():
    with pytest.raises(senet.InputError, match="one value per channel"):
        measure(replace(TINY, mode="train", batch=1, size=4))


class Noisy(nn.Module):
    """A network whose training step is a draw."""

    def __init__(self, **_):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(x.mean((2, 3))) * (1 + torch.rand(()) * self.training)


def test_random_training_is_refused(monkeypatch):
    own_registry(monkeypatch)
    senet.register_model("noisy", Noisy)
    with pytest.raises(senet.InputError, match="use --mode inference"):
        measure(Setting("se_noisy", "train", 2, 16, candidates=EAGER))
    assert measure(Setting("se_noisy", "inference", 2, 16, rounds=1, candidates=EAGER)).stages == []


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_rows_are_the_ratios_of_the_same_rounds(mode):
    said = []
    measured = measure(replace(TINY, mode=mode, rounds=3), lambda what, done, total: said.append((what, done, total)))
    assert measured.complete
    rows = {row["candidate"]: row for row in measured.rows()}
    assert list(rows) == [BASE, "se-reference"]
    plain, se = (measured.timings[name].rounds for name in rows)
    assert rows["se-reference"]["over_twin"] == statistics.median(a / b for a, b in zip(se, plain, strict=True))
    assert rows[BASE]["over_plain"] is None
    assert rows[BASE]["ms"] == pytest.approx(1e3 * statistics.median(plain))
    assert ("timing", 3, 3) in said
    assert {(cost.candidate, cost.stage) for cost in measured.stages} == {("se-reference", s) for s in (2, 3, 4)}
    assert all(check.ok for check in measured.checks)
    if mode == "train":  # the gates' maps are kept besides the plain network's
        assert 1 < rows["se-reference"]["saved_mb_per_image"] / rows[BASE]["saved_mb_per_image"] < 2
    else:
        assert rows[BASE]["saved_mb_per_image"] is None


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_stages_that_are_functions_get_the_input_that_they_get_in_the_network(mode):
    setting = Setting("se_bn_inception", mode, 2, 64, candidates=EAGER)
    twins = make_twins(setting)
    runner = build(CANDIDATES["se-reference"], setting, twins)
    entries = stages.entries(runner.model, "se-reference", setting, twins)
    with torch.no_grad():
        maps = runner.model.forward_stages(twins.x)
    for (stage, entry), after in zip(entries, maps, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(stage(entry), after)
    costs = stages.stage_costs(setting, twins, {n: build(CANDIDATES[n], setting, twins) for n in EAGER}, rounds=1)
    assert [cost.stage for cost in costs] == [2, 3, 4, 5]
    assert all(cost.ms > 0 for cost in costs)


def test_bytes_saved_for_backward_counted_by_hand():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU())
    x, y = torch.randn(4, 6), torch.randint(5, (4,))
    floats = 4 * 6 + 4 * 5 + 4 * 5 + 1  # image; ReLU's output; log softmax's; the loss's total weight
    assert saved_for_backward(model, x, y) == 4 * floats + 8 * 4  # and the labels


def test_a_wrong_output_is_not_timed(monkeypatch):
    def wrong(candidate, setting, twins):
        runner = build(candidate, setting, twins)
        return runner if candidate.name == BASE else replace(runner, run=lambda: runner.run() * 1.0001)

    monkeypatch.setattr(tax, "build", wrong)
    measured = Measured(TINY)
    with pytest.raises(CheckError, match=one_line("se-reference, outputs: 1.0e-04 … nothing was timed")):
        measure_into(measured, lambda *_: None)
    assert not measured.timings
    assert not measured.complete


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    original, wanted = checks.gradients, torch.float64

    def wrong(model, setting, twins, backend, dtype):
        found = original(model, setting, twins, "reference", dtype)
        if backend != "reference" and dtype == wanted:
            found[-3] = found[-3] * (1 + 1e-6)  # of one tensor of many
        return found

    monkeypatch.setattr(checks, "gradients", wrong)
    monkeypatch.setattr(checks, "chosen_backend", lambda setting: "compiled")
    setting = replace(TINY, mode="train", candidates=choose(["se-accelerated"]))
    with pytest.raises(CheckError, match=one_line("plain-accelerated (compiled), gradients in float64")):
        measure(setting)
    wanted = None
    assert all(check.ok for check in checks.check_gradients(setting))


def test_accelerated_networks_agree_in_training_and_are_timed():
    measured = measure(replace(TINY, mode="train", candidates=choose(["se-accelerated"])))
    names = ["plain-accelerated"] * 2 + ["se-accelerated"] * 2
    assert [check.what.partition(",")[0].partition(" ")[0] for check in measured.checks[:4]] == names
    assert measured.timings.keys() == measured.saved_mb.keys() == {BASE, "plain-accelerated", "se-accelerated"}
    assert {(cost.candidate, cost.stage) for cost in measured.stages} == {("se-accelerated", s) for s in (2, 3, 4)}


def test_timm_computes_the_same():
    measured = measure(Setting("se_resnet18", "inference", 2, 32, rounds=1, candidates=choose(["timm-se"])))
    assert measured.timings.keys() == {BASE, "timm-plain", "timm-se"}
    rows = measured.rows()
    assert rows[-1]["over_twin"] == rows[-1]["over_twin_q25"]  # of one round
    left = measure(replace(TINY, candidates=choose(["timm-se"]))).left_out
    assert left == {"timm-plain": "timm has no twin of resnet8", "timm-se": "timm has no twin of se_resnet8"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_exported_networks_compute_the_same(engine):
    pytest.importorskip(engine)
    pytest.importorskip("onnxscript")
    measured = measure(replace(TINY, candidates=choose([f"{engine}-se"])))
    assert measured.timings.keys() == {BASE, f"{engine}-plain", f"{engine}-se"}
    half = measure(replace(TINY, candidates=choose([f"{engine}-se"]), dtype="bfloat16"))
    assert half.left_out[f"{engine}-se"] == "measured in float32 only"


def test_missing_peers_say_what_to_install(monkeypatch):
    for name in ("openvino", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    measured = measure(replace(TINY, candidates=choose(["openvino-se", "timm-se"])))
    assert measured.left_out["openvino-se"].endswith("pip install openvino onnx onnxscript")
    assert measured.left_out["timm-plain"].endswith("pip install timm")
    assert measured.timings.keys() == {BASE}


def test_compiled_inference_is_frozen_and_each_candidate_has_code_of_its_own():
    setting = replace(TINY, candidates=choose(["se-compiled", "se-accelerated-compiled"]))
    assert measure(setting).timings.keys() == {*setting.candidates}
    twins = make_twins(setting)
    runners = [build(CANDIDATES[name], setting, twins) for name in ("plain-compiled", "se-compiled")]
    plain, se = (runner.run() for runner in runners)
    assert not torch.allclose(plain, se)
    for runner, before in zip(runners, (plain, se), strict=True):
        norms = [module for module in runner.model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.running_var.mul_(2)  # folded into the convolutions: no longer looked at
        assert torch.equal(runner.run(), before)


def test_stopped_runs_keep_their_rounds(tmp_path):
    def stop_after_two(what, done, total):
        if what == "timing" and done == 2:
            raise KeyboardInterrupt

    measured = Measured(replace(TINY, rounds=9))
    with pytest.raises(KeyboardInterrupt):
        measure_into(measured, stop_after_two)
    assert not measured.complete
    assert all(len(timing.rounds) == 2 for timing in measured.timings.values())
    write_tax(tmp_path, [measured, Measured(TINY)])
    rows = rows_of(tmp_path / "tax.csv")
    assert [row["candidate"] for row in rows] == [BASE, "se-reference"]
    assert rows[1]["rounds"] == "2"
    content = json.loads((tmp_path / "tax.json").read_text())
    assert content["complete"] is False
    assert content["settings"][0]["checks"]
    assert content["machine"]["torch"] == torch.__version__


def test_the_figure_grows_with_its_rows(tmp_path):
    measured = Measured(TINY)
    measured.timings = {name: Timing((1.0, 1.2)) for name in EAGER}
    few = measured.rows()
    measured.timings = {name: Timing((1.0, 1.2)) for name in CANDIDATES}
    for name, settings in (("few", [few, []]), ("many", [measured.rows(), few, few])):
        plot_tax(tmp_path / f"{name}.png", settings, "title")
    few_shape, many_shape = (imread(tmp_path / f"{name}.png").shape for name in ("few", "many"))
    assert many_shape[0] > 2 * few_shape[0]
    assert many_shape[1] == 2 * few_shape[1]


def test_each_round_is_reported_and_one_round_has_a_ratio():
    seen = []
    steps = {"a": lambda: None, "b": lambda: None}
    times = interleaved(steps, rounds=2, warmup=1, on_round=lambda timings: seen.append(len(timings["b"].rounds)))
    assert seen == [1, 2]
    assert len(times["a"].rounds) == 2
    assert ratio(Timing((3.0,)), Timing((2.0,))).q75 == 1.5


@pytest.fixture
def scripts(monkeypatch):
    """The scripts of benchmarks/, importable as they are when run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import gpu_sweeps
    import tax as script

    return {"gpu": gpu, "gpu_sweeps": gpu_sweeps, "tax": script}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without one")
def test_gpu_script_without_a_gpu_is_one_line(scripts, capsys, tmp_path):
    assert scripts["gpu"].main(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert_said(said, "no CUDA device")
    assert said.count("\n") == 1


FROM_START_TO_END = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu, gpu_sweeps as sweeps
sweeps.CHECKED = ((3, 5, 7, 9), (2, 8, 1, 1))
sweeps.check.__defaults__ = (sweeps.CHECKED,)
sweeps.bandwidth.__defaults__ = (((8, 4), (16, 2)),)
gpu.TAXES = (("train", 2, "se-accelerated"), ("inference", 2, "se-accelerated"))
words = ["--device", "cpu", "--backend", "reference", "--model", "se_resnet8", "--size", "16", "--rounds", "1"]
words += ["--batch", "2", "--sweep-batch", "2", "--output", sys.argv[2]]
assert gpu.main([*words, "--only", "checks", "sweeps", "train"]) == 0
assert gpu.main([*words, "--minutes", "0"]) == 0
"""


def test_gpu_script_from_start_to_end_on_the_processor(tmp_path):
    # in a process of its own, as a user runs it
    command = [sys.executable, "-c", FROM_START_TO_END, str(BENCHMARKS), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "0 wrong results" in run.stdout
    assert "peak training memory" not in run.stdout  # there is no such thing on a processor
    assert run.stdout.count("dropped for lack of time") == 4
    bandwidth, ratios = (rows_of(tmp_path / f"gpu_{name}.csv") for name in ("bandwidth", "tax"))
    assert [row["shape"] for row in bandwidth] == ["2x8x4x4"] * 4 + ["2x16x2x2"] * 4
    assert any(row["what"] == "saved for backward, SE ÷ plain eager" for row in ratios)
    assert {path.name for path in tmp_path.glob("*.png")} == {"gpu_bandwidth.png", "gpu_networks.png"}


def test_gpu_script_finds_a_wrong_sweep(scripts):
    from senet.ops.dispatch import sweeps_of

    right = sweeps_of("reference")
    wrong = replace(right, moments_backward=lambda *args: right.moments_backward(*args) * 1.01)
    for run, bad in ((right, set()), (wrong, {"moments_backward"})):
        rows = scripts["gpu_sweeps"].check(run, "cpu", ((2, 5, 4, 4),))
        assert {row["sweep"] for row in rows if row["share_of_allowed"] > 1} == bad


def test_targets_take_the_fastest_of_each_side(scripts):
    script = scripts["tax"]
    measured = Measured(replace(TINY, candidates=choose(["*"])))
    seconds = {"plain-eager": 2.0, "plain-compiled": 1.0, "se-accelerated": 1.3, "se-accelerated-compiled": 1.1}
    seconds |= {"onnxruntime-se": 1.2, "openvino-se": 1.0}
    measured.timings = {name: Timing((value, value)) for name, value in seconds.items()}
    rows = [row for row in script.pairs(measured, script.CPU_TARGETS) if row["target"] is not None]
    assert [(row["numerator"], row["denominator"], round(row["ratio"], 3)) for row in rows] == [
        ("se-accelerated-compiled", "plain-compiled", 1.1),
        ("se-accelerated-compiled", "se-accelerated", 0.846),
        ("se-accelerated-compiled", "openvino-se", 1.1),
    ]


def test_over_processes_a_row_has_the_median_of_their_medians(scripts, monkeypatch, tmp_path):
    script, ratios = scripts["tax"], iter((1.3, 1.0, 1.1))
    setting = {"model": "m", "mode": "train", "of": "time", "numerator": "a", "denominator": "b"}
    target = {"target": "1.0", "what": "the target"}

    def child(command, check):
        file = command[command.index("--file") + 1]
        here = next(ratios)
        stands_for = {"target": "", "what": ""} if here > 1.2 else target  # there another engine was the fastest
        script.append_row(file, **setting, **stands_for, ratio=here, q25=0, q75=9)
        if here > 1.2:
            script.append_row(file, **setting | {"numerator": "c"}, **target, ratio=1, q25=0, q75=9)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", child)
    monkeypatch.setattr("common.commit", lambda: "0")
    assert script.over_processes(3, [], str(tmp_path / "tax.csv")) == 0
    (row,) = rows_of(tmp_path / "tax.csv")
    assert [row[key] for key in ("numerator", "ratio", "q25", "q75")] == ["a", "1.1000", "1.0500", "1.2000"]
    assert (row["target"], row["what"]) == ("1.0", "the target")
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    assert script.over_processes(3, [], str(tmp_path / "tax.csv")) == 1


def test_the_sweep_changes_one_thing_at_a_time_and_draws(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tax_sweep

    settings = [setting for _, _, setting in tax_sweep.settings("train", None, 9)]
    ordinary = {"model": "se_resnet50", "batch": 4, "size": 224}
    assert all(sum(getattr(s, key) != value for key, value in ordinary.items()) <= 1 for s in settings)
    row = dict(zip(tax_sweep.KEYS, ("train", "batch", "time", "se-accelerated", "plain-eager"), strict=True))
    rows = [row | {"value": str(v), "ratio": "1.1", "q25": "1.0", "q75": "1.2"} for v in tax_sweep.POINTS["batch"]]
    tax_sweep.draw(rows, tmp_path / "sweep.png")
    assert imread(tmp_path / "sweep.png").shape[1] > 700  # one panel: only the batch was measured
