"""Tiny images, drawn here."""

import random

import pytest
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """<folder>/<class>/<number>.png: two classes of 12 images of 12 pixels."""
    folder, rng = tmp_path_factory.mktemp("photos"), random.Random(5)
    for name, colour in (("warm", "orange"), ("cold", "navy")):
        (folder / name).mkdir()
        for number in range(12):
            image = Image.new("RGB", (12, 12), (rng.randrange(90),) * 3)
            x, y = rng.randrange(1, 5), rng.randrange(1, 5)
            ImageDraw.Draw(image).rectangle((x, y, x + 5, y + 5), fill=colour)
            image.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def senet(capsys, monkeypatch):
    """Run the command line in this process: (exit code, output, error output)."""
    from senet.cli.main import main

    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    from senet.cli.main import main

    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["train", "--data", photos, "--model", "se_resnet8", "--epochs", 1, "--set", "batch_size=8", "-o", folder]
    assert main([str(word) for word in words]) == 0
    return folder
