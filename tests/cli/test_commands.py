import csv
import io
import json

import pytest
from typer.testing import CliRunner

from helpers.messages import assert_said
from senet import __version__
from senet.cli.main import EXTRAS, app, describe
from senet.runs.recipe import load_recipe


def test_version_and_help_of_every_command(senet):
    assert senet("--version") == (0, f"senet {__version__}\n", "")
    for command in ("train", "eval", "predict", "compare", "list", "bench"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "--help" in result.output


def test_train_eval_predict(senet, photos, trained, tmp_path):
    weights = trained / "best.safetensors"
    code, out, _ = senet("eval", "--data", photos, "--checkpoint", weights)
    assert code == 0
    assert "—" in out  # top-5 of two classes
    assert "to validate" in out
    code, out, _ = senet("eval", "--data", photos, "--checkpoint", weights, "--crops", "ten", "--size", 16, "--json")
    values = json.loads(out)
    assert (code, values["images"], values["size"], values["crops"]) == (0, 4, 16, "ten")
    assert values["top1_interval"][0] <= values["top1_error"] <= values["top1_interval"][1]

    code, out, _ = senet("predict", "-c", weights, photos / "warm", photos / "cold" / "3.png", "--csv", "-", "-k", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(rows) == 26
    assert {row["class"] for row in rows} == {"warm", "cold"}
    assert sum(float(row["probability"]) for row in rows[:2]) == pytest.approx(1, abs=1e-5)
    assert [row["rank"] for row in rows[:2]] == ["1", "2"]
    target = tmp_path / "answers.csv"
    assert senet("predict", "-c", weights, photos / "warm", "--csv", target)[0] == 0
    assert target.read_text().count("\n") == 13


def test_compile_chooses_how_networks_run(senet, photos, trained, graphs, tmp_path):
    run, weights = tmp_path / "run", trained / "best.safetensors"
    words = ("train", "--data", photos, "--model", "se_resnet8", "--epochs", 1, "--set", "batch_size=8", "-o", run)
    assert senet(*words, "--compile", "off")[0] == 0
    assert load_recipe(run / "recipe.yaml").compile == "off"
    assert senet("eval", "--data", photos, "-c", weights)[0] == 0  # few images
    assert not graphs
    for words in (("eval", "--data", photos), ("predict", photos / "warm")):
        before = len(graphs)
        assert senet(*words, "-c", weights, "--compile", "senet")[0] == 0
        assert len(graphs) > before


def test_predict_names_bad_files_and_does_the_rest(senet, photos, trained, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    code, out, err = senet(
        "predict", "-c", trained / "best.safetensors", tmp_path / "broken.jpg", photos / "cold" / "1.png"
    )
    assert code == 1
    assert str(photos / "cold" / "1.png") in out  # whole, where no terminal limits the width
    assert "warning: skipped" in err
    assert "broken.jpg" in err


@pytest.mark.parametrize("command", ["train", "compare", "eval", "inspect", "fold"])
def test_an_empty_data_is_not_the_working_folder(senet, photos, trained, tmp_path, monkeypatch, command):
    monkeypatch.chdir(photos)
    weights, new = ("--checkpoint", trained / "best.safetensors"), ("--output", tmp_path / "out")
    words = {
        "train": ("--model", "se_resnet8", *new),
        "compare": ("--model", "se_resnet8", *new),
        "eval": weights,
        "inspect": (*weights, *new),
        "fold": (*weights, *new),
    }
    code, _, err = senet(command, "--data", "", *words[command])
    assert code == 2
    assert "--data is empty" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "compare", "eval", "inspect", "fold", "predict"])
def test_images_above_max_pixels_are_named_and_not_taken(senet, photos, trained, tmp_path, command):
    weights, new = ("--checkpoint", trained / "best.safetensors"), ("--output", tmp_path / "out")
    words = {
        "train": ("--data", photos, "--model", "se_resnet8", "--epochs", 1, *new),
        "compare": ("--data", photos, "--model", "se_resnet8", "--epochs", 1, "--seeds", 1, *new),
        "eval": ("--data", photos, *weights),
        "inspect": ("--data", photos, *weights, *new),
        "fold": ("--data", photos, *weights, *new, "--rounds", 0),
        "predict": (photos / "cold", *weights),
    }
    code, _, err = senet(command, *words[command], "--workers", 0, "--max-pixels", 143)
    assert code == (1 if command == "predict" else 2)
    assert_said(err, "12x12 … 143")
    assert "png" in err


def test_compare_prints_table_and_verdict(senet, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)
    words = ("compare", "--data", photos, "--model", "resnet8", "--seeds", 1, "--epochs", 1, "--set", "batch_size=8")
    code, out, err = senet(*words, "-o", tmp_path / "out", "--se", "gate=tanh")
    assert code == 0
    for word in ("se_resnet8", "parameters", "multiply-adds", "validation error", "training step", "verdict"):
        assert word in out
    assert_said(out, "no interval")
    assert "epoch 1/1" in err
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_list(senet):
    code, out, _ = senet("list", "se_resnet8")
    assert code == 0
    assert "se_resnet8" in out
    assert "resnet50" not in out
    code, out, _ = senet("list", "resnet8", "--json")
    assert json.loads(out)[0]["twin"] == "se_resnet8"
    code, out, err = senet("list", "nothing*")
    assert (code, out) == (2, "")
    assert err.startswith("error: no model matches")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train",), "specify the run folder"),
        (("train", "-o", "{tmp}/r"), "specify what to train"),
        (("train", "--data", "{photos}", "--model", "se_resnet9", "-o", "{tmp}/r"), "did you mean"),
        (("train", "--data", "{tmp}/none", "--model", "se_resnet8", "-o", "{tmp}/r"), "none"),
        (("train", "--data", "{photos}", "--model", "se_resnet8", "-o", "{tmp}/r", "--set", "lrr=1"), "did you mean"),
        (("train", "--data", "{photos}", "--model", "se_resnet8", "-o", "{tmp}/r", "--se", "reduction"), "KEY=VALUE"),
        (("train", "--data", "{photos}", "--model", "se_resnet8", "-o", "{tmp}/r", "--se", "gate=soft"), "gate"),
        (("train", "--data", "{photos}", "--model", "se_resnet8", "-o", "{tmp}/r", "--device", "tpu"), "tpu"),
        (("train", "--resume", "{tmp}"), "holds no run"),
        (("train", "{tmp}/r"), "unexpected argument"),
        (("compare", "--data", "{photos}", "--seeds", "0", "-o", "{tmp}/r"), "--seeds"),
        (("compare", "--data", "{photos}", "--recipe", "cifr", "-o", "{tmp}/r"), "did you mean 'cifar'"),
        (("compare", "--epochs", "many"), "--epochs"),
        (("compare", "--frobnicate"), "frobnicate"),
        (("eval", "--data", "{photos}", "-c", "{tmp}/none.safetensors"), "no such weight file"),
        (("eval", "--data", "{photos}", "-c", "{photos}/warm/0.png"), "0.png"),
        (("predict", "-c", "{weights}", "{tmp}/none.png"), "missing"),
        (("predict", "-c", "{weights}", "{photos}", "--csv", "{tmp}"), "error:"),
        (("fly",), "fly"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(senet, photos, trained, tmp_path, words, message):
    places = {"tmp": tmp_path, "photos": photos, "weights": trained / "best.safetensors"}
    code, out, err = senet(*(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "r").exists()


def test_a_missing_extra_says_what_to_install():
    code, message = describe(ModuleNotFoundError("No module named 'lightning'", name="lightning.pytorch"))
    assert (code, message) == (2, "error: this command needs 'lightning': pip install 'senet[train]'")
    assert "torch" not in EXTRAS
    with pytest.raises(ModuleNotFoundError):  # our own mistake: the traceback is wanted
        describe(ModuleNotFoundError("No module named 'senet.x'", name="senet.x"))


def test_the_machines_errors_are_one_line_too():
    assert describe(OSError(28, "No space left on device", "run/last.ckpt")) == (
        2,
        "error: No space left on device: run/last.ckpt",
    )
    assert describe(PermissionError(13, "Permission denied", "/x"))[1] == "error: Permission denied: /x"
    with pytest.raises(ZeroDivisionError):
        describe(ZeroDivisionError())
