"""Tiny images, drawn here, and runs on them that take a second."""

import pytest

from helpers.images import draw_classes
from senet.runs.recipe import load_recipe

SHAPES = {"disc": ("disc", "red"), "square": ("square", "green"), "bar": ("bar", "blue")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_classes(folder / "train", SHAPES, 11, seed=1)
    draw_classes(folder / "val", SHAPES, 5, seed=2)
    return folder


@pytest.fixture(scope="session")
def spoiled(tmp_path_factory):
    """150 images to train on and 20 to validate on, with one bad file among the former."""
    folder = tmp_path_factory.mktemp("spoiled")
    draw_classes(folder / "train", SHAPES, 50, seed=1)
    draw_classes(folder / "val", SHAPES, 8, seed=2)
    (folder / "train" / "bar" / "7.png").write_bytes(b"")
    return folder


@pytest.fixture
def quick_recipe():
    """33 images in 5 batches of 8 (the last is 1 image, which training leaves out: 4), two epochs."""

    def make(*changes):
        return load_recipe("cifar", ["epochs=2", "batch_size=8", "lr=0.05", *changes])

    return make
