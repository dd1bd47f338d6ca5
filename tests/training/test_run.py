"""The run folder: what is in it, and that it is never lost by accident."""

import json
import pickle

import pytest
import torch

import senet
from helpers.messages import one_line
from senet.errors import InputError
from senet.runs.settings import RunSettings
from senet.training.callbacks import NonFiniteError
from senet.training.run import train
from senet.weights.load import build_from_checkpoint, load_weights


def test_a_run_folder_holds_what_is_promised(pictures, quick_recipe, tmp_path):
    result = train(RunSettings(str(pictures), "se_resnet8"), quick_recipe(), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {
        *("recipe.yaml", "environment.json", "log.txt", "curves.csv", "curves.png", "run.json", "result.json"),
        *("last.safetensors", "best.safetensors", "last.ckpt", "tensorboard", "steps"),
    }
    assert not any(name.startswith(".") for name in names)
    model, metadata = build_from_checkpoint(tmp_path / "run" / "last.safetensors")
    assert metadata["classes"] == ["bar", "disc", "square"]
    assert metadata["metrics"]["val_error"] == result.val_error
    assert metadata["transform"]["size"] == 12
    assert not model.training
    assert result.val_images == 15
    assert result.val_top5_error is None
    best = load_weights(tmp_path / "run" / "best.safetensors")[1]
    assert (best["epoch"], best["metrics"]["val_error"]) == (result.best_epoch, result.best_val_error)
    assert "33 images" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "steps" / "version_0" / "metrics.csv").read_text().count("\n") > 2


def test_an_existing_run_is_kept(pictures, quick_recipe, tmp_path):
    settings, recipe, folder = RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "run"
    first = train(settings, recipe, folder, loggers=False)
    before = (folder / "last.ckpt").stat().st_mtime_ns
    with pytest.raises(InputError, match="already exists"):
        train(settings, recipe, folder, loggers=False)
    assert train(settings, recipe, folder, resume=True, loggers=False) == first
    assert (folder / "last.ckpt").stat().st_mtime_ns == before
    for other, message in (
        (RunSettings(str(pictures), "se_resnet8"), "model='resnet8'"),
        (RunSettings(str(pictures), "resnet8", seed=5), "seed=0"),
    ):
        with pytest.raises(InputError, match=message):
            train(other, recipe, folder, resume=True, loggers=False)
    with pytest.raises(InputError, match="another recipe"):
        train(settings, quick_recipe("epochs=1", "lr=0.2"), folder, resume=True, loggers=False)
    train(settings, recipe, folder, overwrite=True, loggers=False)
    assert (folder / "last.ckpt").stat().st_mtime_ns != before


def test_only_a_run_is_ever_removed(pictures, quick_recipe, tmp_path, monkeypatch):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("years of work")
    settings = RunSettings(str(pictures), "resnet8")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="not from this command"):
            train(settings, quick_recipe(), mine, **options)
    assert (mine / "chapter1.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="is a file"):
        train(settings, quick_recipe(), mine / "chapter1.tex", overwrite=True)
    (mine / "run.json").write_text("{}")
    monkeypatch.chdir(mine)
    with pytest.raises(InputError, match="working directory"):
        train(settings, quick_recipe(), mine, overwrite=True)
    assert (mine / "chapter1.tex").exists()


def test_mistakes_are_found_before_a_folder_is_made(pictures, quick_recipe, tmp_path):
    for settings, recipe, message in (
        (RunSettings(str(pictures), "se_resnet9"), quick_recipe(), "did you mean"),
        (RunSettings(str(pictures), "resnet8", se=(("reduction", 8),)), quick_recipe(), "plain network"),
        (RunSettings(str(pictures), "se_resnet8", se=(("redaction", 8),)), quick_recipe(), "redaction"),
        (RunSettings(str(pictures), "se_resnet8", se=(("gate", "soft"),)), quick_recipe(), "gate"),
        (RunSettings(str(pictures), "se_resnet8", limit_batches=0), quick_recipe(), "limit_batches"),
        (RunSettings(str(pictures), "se_resnet8", device="cpu"), quick_recipe("precision=16-mixed"), "16-mixed"),
        (RunSettings(str(pictures), "se_resnet8", devices=3), quick_recipe(), "batch_size=8 .* among 3 devices"),
        (RunSettings(str(pictures), "se_resnet8"), quick_recipe("transform.cutout=13"), "cutout.*13.*0 to 12"),
    ):
        with pytest.raises(InputError, match=message):
            train(settings, recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_mistake_leaves_the_run_that_was_to_be_overwritten(pictures, quick_recipe, tmp_path):
    good = RunSettings(str(pictures), "resnet8")
    train(good, quick_recipe("epochs=1"), tmp_path / "run", loggers=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    weights = str(tmp_path / "run" / "last.safetensors")
    for settings, recipe, message in (
        (good, quick_recipe("transform.cutout=13"), "cutout is 13"),
        (good, quick_recipe("transform.size=10", "transform.resize=8"), "resize 8.*size 10"),
        (RunSettings(str(pictures), "resnet14", pretrained=weights), quick_recipe(), "does not fit this network"),
        (RunSettings(str(pictures), "resnet8", devices=3), quick_recipe(), "batch_size"),
        (RunSettings(str(tmp_path / "none"), "resnet8"), quick_recipe(), "none"),
    ):
        with pytest.raises(InputError, match=message):
            train(settings, recipe, tmp_path / "run", overwrite=True, loggers=False)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_what_is_said_before_the_folder_is_made_is_in_its_log(pictures, quick_recipe, tmp_path):
    senet.save_weights(tmp_path / "ten.safetensors", senet.create_model("resnet8", 10))
    settings = RunSettings(str(pictures), "resnet8", pretrained=str(tmp_path / "ten.safetensors"))
    train(settings, quick_recipe("epochs=1"), tmp_path / "run", loggers=False)
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert "different number of classes" in log[0]
    assert "33 images" in log[1]


def test_a_loss_that_explodes_stops_the_run_and_spares_the_last_state(pictures, quick_recipe, tmp_path):
    settings = RunSettings(str(pictures), "resnet8")
    # A warmup from a harmless rate: the first epoch is fine, then the rate explodes.
    recipe = quick_recipe("epochs=3", "lr=1e30", "schedule.name=constant", "optimizer.momentum=0")
    with pytest.raises(NonFiniteError, match=one_line("not finite … epoch 1 … --set lr=")):
        train(settings, recipe, tmp_path / "run", loggers=False)
    assert not (tmp_path / "run" / "result.json").exists()
    checkpoint = tmp_path / "run" / "last.ckpt"
    if checkpoint.exists():
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_last_good_state_stays(pictures, quick_recipe, tmp_path, monkeypatch):
    from senet.training.classifier import Classifier

    honest = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        loss = honest(self, batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == 2:
            self.last_loss = loss.detach() * float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    with pytest.raises(NonFiniteError, match="epoch 2"):
        train(RunSettings(str(pictures), "resnet8"), quick_recipe(), tmp_path / "run", loggers=False)
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert load_weights(tmp_path / "run" / "last.safetensors")[1]["epoch"] == 1


def test_averaged_weights_are_validated_and_saved(pictures, quick_recipe, tmp_path):
    settings = RunSettings(str(pictures), "resnet8")
    plain = train(settings, quick_recipe(), tmp_path / "plain", loggers=False)
    averaged = train(settings, quick_recipe("ema=0.99"), tmp_path / "ema", loggers=False)
    assert averaged.train_error == plain.train_error  # averaging changes nothing in training
    saved = load_weights(tmp_path / "ema" / "last.safetensors")[0]
    state = torch.load(tmp_path / "ema" / "last.ckpt", weights_only=True)
    for key, value in saved.items():
        assert torch.equal(value, state["state_dict"][f"model.{key}"])  # the average
    current = state["current_model_state"]
    assert not torch.equal(saved["conv1.weight"], current["model.conv1.weight"])
    raw = load_weights(tmp_path / "plain" / "last.safetensors")[0]
    assert torch.equal(raw["conv1.weight"], current["model.conv1.weight"])
    assert averaged.val_loss != plain.val_loss


def test_frozen_norms_keep_still(pictures, quick_recipe, tmp_path):
    weights = {}
    settings = RunSettings(str(pictures), "resnet8")
    for name, frozen in (("free", 0), ("frozen", 1)):
        recipe = quick_recipe(f"freeze_bn_epochs={frozen}", "schedule.name=constant")
        train(settings, recipe, tmp_path / name, loggers=False)
        weights[name] = load_weights(tmp_path / name / "last.safetensors")[0]
    train(settings, quick_recipe("epochs=1", "schedule.name=constant"), tmp_path / "first", loggers=False)
    after_one = load_weights(tmp_path / "first" / "last.safetensors")[0]
    for key in ("bn1.weight", "bn1.running_mean", "bn1.num_batches_tracked"):
        assert torch.equal(weights["frozen"][key], after_one[key])
        assert not torch.equal(weights["free"][key], after_one[key])
    assert not torch.equal(weights["frozen"]["conv1.weight"], after_one["conv1.weight"])


def test_a_dry_run_is_short(pictures, quick_recipe, tmp_path):
    settings = RunSettings(str(pictures), "resnet8", limit_batches=1)
    assert train(settings, quick_recipe(), tmp_path / "run", loggers=False).val_images == 8
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_bf16_and_channels_last_train(pictures, quick_recipe, tmp_path):
    recipe = quick_recipe("epochs=1", "precision=bf16-mixed", "channels_last=true", "label_smoothing=0.1")
    result = train(RunSettings(str(pictures), "se_resnet8", device="cpu"), recipe, tmp_path / "run", loggers=False)
    assert 0 <= result.val_error <= 100
    state = load_weights(tmp_path / "run" / "last.safetensors")[0]
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())


def test_a_checkpoint_that_would_run_code_is_refused(pictures, quick_recipe, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    from senet.training.interrupt import Interrupted, StopRequest

    stop = StopRequest()
    stop.requested = True
    settings, folder = RunSettings(str(pictures), "resnet8"), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(settings, quick_recipe(), folder, stop=stop, loggers=False)
    torch.save({"state_dict": Evil()}, folder / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt.*refused"):
        train(settings, quick_recipe(), folder, resume=True, loggers=False)
    (folder / "last.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"last\.ckpt"):
        train(settings, quick_recipe(), folder, resume=True, loggers=False)
    (folder / "last.ckpt").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"last\.ckpt"):
        train(settings, quick_recipe(), folder, resume=True, loggers=False)
    assert not (tmp_path / "owned").exists()


def test_damaged_settings_are_an_input_error(pictures, quick_recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for text in ("{", json.dumps({"data": "x"}), json.dumps({"data": "x", "model": "y", "z": 1})):
        (folder / "run.json").write_text(text)
        (folder / "recipe.yaml").write_text(quick_recipe().to_yaml())
        with pytest.raises(InputError, match="damaged"):
            train(RunSettings(str(pictures), "resnet8"), quick_recipe(), folder, resume=True)
