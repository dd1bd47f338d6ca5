"""Tiny images, drawn here, and runs on them that take a second."""

import random

import pytest
from PIL import Image, ImageDraw

from senet.runs.recipe import load_recipe


def draw_classes(folder, count, seed=0, side=12):
    """Three classes of coloured shapes: <folder>/<class>/<number>.png."""
    rng = random.Random(seed)
    for name, colour in (("disc", "red"), ("square", "green"), ("bar", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (side, side), (rng.randrange(90),) * 3)
            x, y = rng.randrange(1, 5), rng.randrange(1, 5)
            pen = ImageDraw.Draw(image)
            if name == "disc":
                pen.ellipse((x, y, x + 5, y + 5), fill=colour)
            elif name == "square":
                pen.rectangle((x, y, x + 5, y + 5), fill=colour)
            else:
                pen.rectangle((x, y, x + 2, side - 1), fill=colour)
            image.save(folder / name / f"{number}.png")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_classes(folder / "train", 11, seed=1)
    draw_classes(folder / "val", 5, seed=2)
    return folder


@pytest.fixture(scope="session")
def spoiled(tmp_path_factory):
    """150 images to train on and 20 to validate on, with one bad file among the former."""
    folder = tmp_path_factory.mktemp("spoiled")
    draw_classes(folder / "train", 50, seed=1)
    draw_classes(folder / "val", 8, seed=2)
    (folder / "train" / "bar" / "7.png").write_bytes(b"")
    return folder


@pytest.fixture
def quick_recipe():
    """33 images in 5 batches of 8 (the last is 1 image, which training leaves out: 4), two epochs."""

    def make(*changes):
        return load_recipe("cifar", ["epochs=2", "batch_size=8", "lr=0.05", *changes])

    return make
