"""Runs whose network is compiled, as by default."""

import pytest
import torch

from helpers.messages import assert_said
from senet.acceleration import use
from senet.errors import InputError
from senet.runs.recipe import load_recipe
from senet.runs.settings import RunSettings
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.run import train
from senet.weights.load import load_weights


@pytest.fixture
def settings(pictures):
    return RunSettings(str(pictures), "se_resnet8", seed=3)


def state_of(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def test_the_files_of_a_compiled_run_have_the_same_keys(settings, quick_recipe, graphs, tmp_path):
    for how in ("off", "senet"):
        train(settings, quick_recipe("epochs=1", "ema=0.9", f"compile={how}"), tmp_path / how, loggers=False)
        assert bool(graphs) == (how == "senet")
    assert state_of(tmp_path / "off").keys() == state_of(tmp_path / "senet").keys()
    off, compiled = (load_weights(tmp_path / how / "last.safetensors")[0] for how in ("off", "senet"))
    assert off.keys() == compiled.keys()
    for key, value in off.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)
    # training, validation, and the last, smaller batch of each
    assert len(graphs) <= 4


class StopAfterBatches(StopRequest):
    def __init__(self, count):
        super().__init__()
        self.left = count

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    @requested.setter
    def requested(self, value):
        pass


def test_a_compiled_run_that_is_broken_off_resumes_bit_for_bit(settings, quick_recipe, monkeypatch, tmp_path):
    monkeypatch.delenv(use.VARIABLE)
    recipe = quick_recipe("epochs=2", "ema=0.99", "mixup=0.2", "dropout=0.3")
    assert recipe.compile == "senet"
    train(settings, recipe, tmp_path / "whole", loggers=False)
    with pytest.raises(Interrupted):
        train(settings, recipe, tmp_path / "broken", stop=StopAfterBatches(2), loggers=False)
    torch.manual_seed(999)
    train(settings, recipe, tmp_path / "broken", resume=True, loggers=False)
    for name in ("last", "best"):
        whole, broken = (load_weights(tmp_path / run / f"{name}.safetensors")[0] for run in ("whole", "broken"))
        assert all(torch.equal(value, broken[key]) for key, value in whole.items())


def test_a_run_that_is_resumed_keeps_how_it_was_started(settings, quick_recipe, caplog, tmp_path):
    """So do runs that were started before networks were compiled by default."""
    with pytest.raises(Interrupted):
        train(settings, quick_recipe("compile=off"), tmp_path / "run", stop=StopAfterBatches(1), loggers=False)
    train(settings, quick_recipe(), tmp_path / "run", resume=True, loggers=False)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").compile == "off"
    (warning,) = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert_said(warning, "compile: off … keeps it")
    with pytest.raises(InputError, match="another recipe"):
        train(settings, quick_recipe("lr=1"), tmp_path / "run", resume=True, loggers=False)


def test_a_run_that_cannot_be_compiled_goes_on_and_its_log_says_so(settings, graphs, monkeypatch, tmp_path):
    def fails(graph, example_inputs, **_):
        raise RuntimeError("no tape left")

    monkeypatch.setitem(use.HOW, "senet", fails)
    recipe = load_recipe("cifar", ["epochs=1", "batch_size=8"])
    train(settings, recipe, tmp_path / "run", loggers=False)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert sum("uncompiled" in line and "no tape left" in line for line in lines) == 1
    assert (tmp_path / "run" / "last.safetensors").exists()
