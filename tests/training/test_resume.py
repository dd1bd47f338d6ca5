"""A run that is broken off anywhere and resumed ends, bit for bit, as an unbroken one."""

import csv
import shutil

import pytest
import torch

from helpers.messages import one_line
from senet.errors import InputError
from senet.runs.settings import RunSettings
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.run import train
from senet.weights.load import load_weights

# Everything with a state: averaged weights, momentum, a schedule, mixing and dropout that draw random numbers.
EVERYTHING = ("ema=0.99", "mixup=0.2", "cutmix=1.0", "dropout=0.3", "schedule.name=cosine", "clip_grad_norm=1")


class StopAtLook(StopRequest):
    """Asks to stop the n-th time that the run looks."""

    def __init__(self, look):
        super().__init__()
        self.looks, self.look = 0, look

    @property
    def requested(self):
        self.looks += 1
        return self.looks >= self.look

    @requested.setter
    def requested(self, value):
        self.looks = 0


class NeverStop(StopAtLook):
    def __init__(self):
        super().__init__(10**9)


def rows(folder):
    with (folder / "curves.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def leaves(tree):
    if isinstance(tree, (dict, list, tuple)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    for name in ("last.safetensors", "best.safetensors"):
        first, second = load_weights(one / name), load_weights(other / name)
        assert first[1] == second[1]
        for key, value in first[0].items():
            assert torch.equal(value, second[0][key]), (name, key)
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (one, other)]
    flat = [list(leaves(s["optimizer_states"] + s["lr_schedulers"])) for s in states]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    from senet.runs.recipe import load_recipe

    recipe = load_recipe("cifar", ["epochs=3", "batch_size=8", "lr=0.05", *EVERYTHING])
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    stop = NeverStop()
    train(RunSettings(str(pictures), "se_resnet8", seed=3), recipe, folder, stop=stop, loggers=False)
    return folder, recipe, stop.looks


def broken(pictures, recipe, folder, look):
    settings = RunSettings(str(pictures), "se_resnet8", seed=3)
    with pytest.raises(Interrupted):
        train(settings, recipe, folder, stop=StopAtLook(look), loggers=False)
    torch.manual_seed(999)  # a new process would not continue this one's generator either
    train(settings, recipe, folder, resume=True, loggers=False)


# Looks: after batches 1-3 of 4, before validation, after its 2 batches, after the epoch: 7 an epoch.
@pytest.mark.parametrize(("look", "where"), [(2, "mid-epoch"), (4, "validation"), (7, "epochs"), (10, "mid-epoch 2")])
def test_broken_off_and_resumed_equals_unbroken(pictures, unbroken, tmp_path, look, where):
    folder, recipe, _ = unbroken
    broken(pictures, recipe, tmp_path / "run", look)
    assert_same_run(folder, tmp_path / "run")


@pytest.mark.slow
def test_every_point_resumes(pictures, unbroken, tmp_path):
    folder, recipe, looks = unbroken
    assert looks == 20  # none after the last epoch
    for look in range(1, looks + 1):
        broken(pictures, recipe, tmp_path / str(look), look)
        assert_same_run(folder, tmp_path / str(look))


def test_interrupted_twice(pictures, unbroken, tmp_path):
    folder, recipe, _ = unbroken
    settings = RunSettings(str(pictures), "se_resnet8", seed=3)
    for look in (3, 2, 5):
        with pytest.raises(Interrupted):
            train(settings, recipe, tmp_path / "run", resume=True, stop=StopAtLook(look), loggers=False)
    train(settings, recipe, tmp_path / "run", resume=True, loggers=False)
    assert_same_run(folder, tmp_path / "run")


def test_accumulated_gradients_are_not_lost(pictures, quick_recipe, tmp_path):
    recipe = quick_recipe("accumulate=2")
    settings = RunSettings(str(pictures), "se_resnet8")
    train(settings, recipe, tmp_path / "whole", loggers=False)
    broken_folder = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(settings, recipe, broken_folder, stop=StopAtLook(1), loggers=False)
    assert torch.load(broken_folder / "last.ckpt", weights_only=True)["global_step"] == 1
    train(settings, recipe, broken_folder, resume=True, loggers=False)
    assert_same_run(tmp_path / "whole", broken_folder)


def test_a_bad_image_takes_no_batch_and_resumes_alike(spoiled, quick_recipe, tmp_path):
    """Batches of one image: without a replacement, an epoch would end one batch early, and without a validation."""
    recipe = quick_recipe("epochs=2", "accumulate=8")
    settings = RunSettings(str(spoiled), "se_resnet8")
    train(settings, recipe, tmp_path / "whole", loggers=False)
    assert len(rows(tmp_path / "whole")) == 2
    assert "7.png" in (tmp_path / "whole" / "log.txt").read_text()
    with pytest.raises(Interrupted):
        train(settings, recipe, tmp_path / "broken", stop=StopAtLook(7), loggers=False)
    train(settings, recipe, tmp_path / "broken", resume=True, loggers=False)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_validation_without_an_image_is_said(spoiled, pictures, quick_recipe, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(spoiled / "train", data / "train")
    shutil.copytree(spoiled / "train", data / "val")
    (data / "val" / "bar" / "0.png").write_bytes(b"")
    settings = RunSettings(str(data), "se_resnet8", limit_batches=1)
    with pytest.raises(InputError, match=one_line("none … validation images")):
        train(settings, quick_recipe("accumulate=8"), tmp_path / "run", loggers=False)


def test_same_seed_same_run_and_other_seed_other_run(pictures, quick_recipe, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(RunSettings(str(pictures), "se_resnet8", seed=seed), quick_recipe(), tmp_path / name, loggers=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_workers_do_not_change_the_run(pictures, quick_recipe, tmp_path):
    for name, workers in (("a", 0), ("b", 1)):
        settings = RunSettings(str(pictures), "se_resnet8", workers=workers)
        train(settings, quick_recipe("epochs=1"), tmp_path / name, loggers=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
