"""A run knows its data: what a resume on others does, and what an evaluation counts after they have moved."""

import json
import shutil

import pytest

from helpers.messages import assert_said, one_line
from senet.cli.main import main
from senet.comparison.compare import compare
from senet.errors import InputError
from senet.evaluation.evaluate import evaluate
from senet.runs.settings import RunSettings
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.run import train
from senet.weights.load import load_weights


@pytest.fixture
def data(pictures, tmp_path):
    return shutil.copytree(pictures / "train", tmp_path / "data")


def begun(data, recipe, folder):
    """A run that has had three of its epoch's batches."""

    class Stop(StopRequest):
        looks = 0

        @property
        def requested(self):
            self.looks += 1
            return self.looks > 3

        @requested.setter
        def requested(self, value):
            pass

    with pytest.raises(Interrupted):
        train(RunSettings(str(data), "se_resnet8"), recipe, folder, stop=Stop(), loggers=False)
    return folder


def resume(folder, *words):
    return main(["train", "--resume", str(folder), *map(str, words)])


def test_the_record_says_what_the_split_was_made_of(data, quick_recipe, tmp_path):
    run = begun(data, quick_recipe(), tmp_path / "run")
    record = json.loads((run / "data.json").read_text())
    assert record["classes"] == ["bar", "disc", "square"]
    assert (record["train"]["counts"], record["val"]["counts"]) == ([9, 9, 9], [2, 2, 2])
    name, size = record["sample"][0]
    assert (data / name).stat().st_size == size


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_other_classes_are_refused(data, quick_recipe, tmp_path, capsys, change):
    run = begun(data, quick_recipe(), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    if change == "added":
        shutil.copytree(data / "bar", data / "ant")
    elif change == "removed":
        shutil.rmtree(data / "bar")
    else:
        (data / "bar").rename(data / "zebra")
    capsys.readouterr()
    for words in ((), ("--allow-changed-data",)):
        assert resume(run, *words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for name in {"added": ["ant"], "removed": ["bar"], "renamed": ["bar", "zebra"]}[change]:
            assert name in error
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_other_images_must_be_allowed(data, quick_recipe, tmp_path, capsys, change):
    run = begun(data, quick_recipe(), tmp_path / "run")
    for number in range(8):
        path = data / "disc" / f"{number}.png"
        if change == "added":
            shutil.copy(path, path.with_stem(f"more{number}"))
        elif change == "removed":
            path.unlink()
        else:
            path.rename(path.with_stem(f"other{number}"))
    capsys.readouterr()
    assert resume(run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_said(error, "27 … 6")
    assert "--allow-changed-data" in error
    assert resume(run, "--allow-changed-data") == 0
    assert "warning:" in capsys.readouterr().err
    counts = json.loads((run / "data.json").read_text())["train"]["counts"]
    assert counts == {"added": [9, 15, 9], "removed": [9, 2, 9], "renamed": [9, 9, 9]}[change]


def test_moved_data_are_given_anew_and_the_result_is_the_same(data, quick_recipe, tmp_path, capsys):
    whole = train(RunSettings(str(data), "se_resnet8"), quick_recipe(), tmp_path / "whole", loggers=False)
    run = begun(data, quick_recipe(), tmp_path / "run")
    moved = data.rename(tmp_path / "moved")
    assert resume(run) == 2
    assert "--data" in capsys.readouterr().err
    assert resume(run, "--data", "digits") == 2
    assert resume(run, "--data", moved) == 0
    assert load_weights(run / "last.safetensors")[1]["metrics"]["val_loss"] == whole.val_loss
    assert json.loads((run / "run.json").read_text())["data"] == str(moved)


def test_an_evaluation_leaves_training_images_out_wherever_they_are(data, quick_recipe, tmp_path, pictures, caplog):
    result = train(RunSettings(str(data), "se_resnet8"), quick_recipe("epochs=1"), tmp_path / "run", loggers=False)
    weights = tmp_path / "run" / "last.safetensors"
    moved = data.rename(tmp_path / "moved")
    found = evaluate(weights, str(moved))
    assert found.images == result.val_images
    assert found.top1_error == pytest.approx(result.val_error, abs=1e-4)
    assert "has other images now" not in caplog.text
    assert evaluate(weights, str(pictures / "val")).images == 15  # the same names, other images
    (moved / "disc" / "3.png").unlink()
    assert evaluate(weights, str(moved)).images == 6
    assert "has other images now" in caplog.text


def test_a_run_of_the_version_before_goes_on_and_gets_a_record(data, quick_recipe, tmp_path):
    settings, recipe = RunSettings(str(data), "se_resnet8"), quick_recipe()
    for name in ("here", "moved"):
        (begun(data, recipe, tmp_path / name) / "data.json").unlink()
    train(settings, recipe, tmp_path / "here", resume=True, loggers=False)
    assert (tmp_path / "here" / "data.json").is_file()
    moved = RunSettings(str(data.rename(tmp_path / "elsewhere")), "se_resnet8")
    with pytest.raises(InputError, match="kept no record"):
        train(moved, recipe, tmp_path / "moved", resume=True, loggers=False)
    train(moved, recipe, tmp_path / "moved", resume=True, allow_changed_data=True, loggers=False)


def test_a_verdict_never_pools_runs_on_different_data(data, quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)
    settings, recipe, output = RunSettings(str(data), "resnet8"), quick_recipe("epochs=1"), tmp_path / "out"
    compare(settings, recipe, output, seeds=1)
    for path in list((data / "disc").iterdir()):
        shutil.copy(path, path.with_stem(f"more{path.stem}"))
    message = "different data.*27 images to train and 6 to validate.*--allow-changed-data"
    with pytest.raises(InputError, match=message):
        compare(settings, recipe, output, seeds=2, resume=True)
    for other in (RunSettings(str(data), "resnet8", val_fraction=0.4), RunSettings(str(data), "resnet8", sites="late")):
        with pytest.raises(InputError, match="was started with"):
            compare(other, recipe, output, resume=True)
    with pytest.raises(InputError, match="another recipe"):  # also where no run of the old recipe would take part
        compare(RunSettings(str(data), "resnet8", seed=9), quick_recipe("lr=1"), output, resume=True)
    found = compare(settings, recipe, output, seeds=1, resume=True, allow_changed_data=True)
    assert [run.val_images for side in (found.plain, found.se) for run in side.runs] == [8, 8]


def test_a_comparison_of_the_version_before_is_known_by_its_number_of_images(data, quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)
    settings, recipe, output = RunSettings(str(data), "resnet8"), quick_recipe("epochs=1"), tmp_path / "out"
    first = compare(settings, recipe, output, seeds=1)
    (output / "compare.json").write_text(json.dumps({"plain": "resnet8", "se": "se_resnet8", "data": str(data)}))
    for path in output.glob("runs/*/data.json"):
        path.unlink()
    assert compare(settings, recipe, output, seeds=1, resume=True).difference == first.difference
    for path in list((data / "disc").iterdir()):
        shutil.copy(path, path.with_stem(f"more{path.stem}"))
    with pytest.raises(InputError, match=one_line("different data … 6 images")):
        compare(settings, recipe, output, seeds=1, resume=True)
