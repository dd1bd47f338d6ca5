import csv
import json

import pytest
import torch
from PIL import Image

from senet.comparison.compare import compare, explain, twins
from senet.comparison.statistics import Interval, paired_interval, verdict
from senet.errors import InputError
from senet.runs.settings import RunSettings
from senet.training.interrupt import Interrupted, StopRequest
from senet.weights.load import load_weights


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)


def test_comparison_end_to_end(pictures, quick_recipe, tmp_path):
    settings = RunSettings(str(pictures), "se_resnet8", se=(("reduction", 4),))
    found = compare(settings, quick_recipe(), tmp_path / "out", seeds=2)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    errors = {side: [run["val_error"] for run in saved[side]["runs"]] for side in ("plain", "se")}
    difference = paired_interval(errors["se"], errors["plain"])
    assert saved["difference"]["mean"] == pytest.approx(difference.mean)
    assert saved["difference"]["half_width"] == pytest.approx(max(difference.half_width, 100 / 15))
    assert saved["verdict"] == found.verdict == verdict(found.difference)
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["run"] * 4 + ["mean"] * 2 + ["difference"]
    assert float(rows[4]["val_error"]) == pytest.approx(sum(errors["se"]) / 2)
    assert found.se.cost.params > found.plain.cost.params
    assert found.step_ratio.q25 <= found.step_ratio.median <= found.step_ratio.q75
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert min(image.size) > 500
    metadata = load_weights(tmp_path / "out" / "runs" / "se_resnet8-seed0" / "last.safetensors")[1]
    assert metadata["se"]["reduction"] == 4


def test_a_mistake_leaves_the_comparison_that_was_to_be_overwritten(pictures, quick_recipe, tmp_path):
    compare(RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "out", seeds=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = str(tmp_path / "out" / "runs" / "resnet8-seed0" / "last.safetensors")
    for settings, recipe, message in (
        (RunSettings(str(pictures), "resnet8"), quick_recipe("transform.cutout=13"), "cutout is 13"),
        (RunSettings(str(pictures), "resnet8", pretrained=weights), quick_recipe(), "does not fit this network"),
    ):
        with pytest.raises(InputError, match=message):
            compare(settings, recipe, tmp_path / "out", overwrite=True)
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_last_epoch_is_reported_not_the_best(pictures, quick_recipe, tmp_path):
    found = compare(RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=3"), tmp_path / "out", seeds=1)
    for side in (found.plain, found.se):
        run = side.runs[0]
        with (tmp_path / "out" / "runs" / f"{side.model}-seed0" / "curves.csv").open() as file:
            errors = [float(row["val_error"]) for row in csv.DictReader(file)]
        assert side.val_error.mean == errors[-1]
        assert run.best_val_error == min(errors)
    assert found.difference.half_width is None
    assert found.verdict == "one seed cannot say"
    assert "no interval" in found.sentence


def test_an_interrupted_comparison_resumes_without_repeating(pictures, quick_recipe, tmp_path, monkeypatch):
    settings, recipe = RunSettings(str(pictures), "se_resnet8"), quick_recipe()
    whole = compare(settings, recipe, tmp_path / "whole", seeds=2)
    looks = 0

    class StopLater(StopRequest):
        @property
        def requested(self):
            nonlocal looks
            looks += 1
            return looks > 30

        @requested.setter
        def requested(self, value):
            pass

    monkeypatch.setattr("senet.comparison.compare.StopRequest", StopLater)
    with pytest.raises(Interrupted):
        compare(settings, recipe, tmp_path / "out", seeds=2)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*/result.json")}
    assert 1 <= len(done) < 4
    monkeypatch.undo()
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)
    resumed = compare(settings, recipe, tmp_path / "out", seeds=2, resume=True)
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written
    assert resumed.difference == whole.difference
    assert [run.val_loss for run in resumed.se.runs] == [run.val_loss for run in whole.se.runs]
    with pytest.raises(InputError, match="already exists"):
        compare(settings, recipe, tmp_path / "out", seeds=2)
    with pytest.raises(InputError, match="compares se_resnet8 with resnet8"):
        compare(RunSettings(str(pictures), "se_resnet14"), recipe, tmp_path / "out", resume=True)
    with pytest.raises(InputError, match="started with another recipe"):
        compare(settings, quick_recipe("lr=1"), tmp_path / "out", seeds=2, resume=True)


def test_twins_start_alike_and_see_the_same_images(pictures, quick_recipe, tmp_path):
    from senet.data.sources import open_source
    from senet.training.run import build_classifier

    source = open_source(str(pictures))
    plain, se = (
        build_classifier(RunSettings("x", name, seed=7), quick_recipe(), source)[0].model
        for name in ("resnet8", "se_resnet8")
    )
    own, other = plain.state_dict(), se.state_dict()
    assert set(own) < set(other)
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_either_twin_names_the_pair():
    assert twins("resnet20") == twins("se_resnet20") == ("resnet20", "se_resnet20")
    assert twins("se_resnet50") == ("resnet50", "se_resnet50")


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(-1.2, 0.4, 3), "-1.20 ± 0.40 points over 3 seeds"),
        (Interval(0.1, 0.9, 3), "smaller than about 0.90 points would not be seen"),
        (Interval(0.1, None, 1), "Use --seeds 3 or more"),
    ],
)
def test_the_sentence_says_how_much_was_seen(difference, words):
    assert words in explain(verdict(difference), difference, 359)


def test_no_seed_at_all(pictures, quick_recipe, tmp_path):
    with pytest.raises(InputError, match="--seeds is 0"):
        compare(RunSettings(str(pictures), "resnet8"), quick_recipe(), tmp_path / "out", seeds=0)
