"""The examples run as they are printed, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def detect(tmp_path, *arguments):
    output = tmp_path / "found.png"
    command = [sys.executable, "-W", "error", EXAMPLES / "detection.py", "--output", output, *arguments]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", run.stdout)]
    return losses, np.asarray(Image.open(output)), int(re.search(r"(\d+) boxes drawn", run.stdout).group(1))


def test_detection_on_a_small_network(tmp_path):
    losses, picture, _ = detect(tmp_path, "--model", "se_resnet18", "--size", "64", "--steps", "4", "--batch", "2")
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    assert picture.shape == (2 * (128 + 4) + 4, 4 * (128 + 4) + 4, 3)
    assert picture.std() > 10


@pytest.mark.slow
def test_detection_learns_and_finds_boxes(tmp_path):
    losses, _, boxes = detect(tmp_path, "--steps", "80")
    assert losses[-1] < losses[0]
    assert boxes >= 4  # eight images with one to three shapes each


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "se_bn_inception", "se_mobilenet_v1", "shufflenet_v1_g3", "se_resnet20"])
def test_detection_takes_any_network_with_stages(name, tmp_path):
    losses, _, _ = detect(tmp_path, "--model", name, "--size", "64", "--steps", "2", "--batch", "2")
    assert np.isfinite(losses).all()
