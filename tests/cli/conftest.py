"""Tiny images, drawn here."""

import pytest

from helpers.images import draw_classes


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """<folder>/<class>/<number>.png: two classes of 12 images of 12 pixels."""
    shapes = {"warm": ("square", "orange"), "cold": ("square", "navy")}
    return draw_classes(tmp_path_factory.mktemp("photos"), shapes, 12, seed=5)


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
