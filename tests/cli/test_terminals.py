"""Every terminal: encodings that lack our marks, and names that no encoding has."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

# Python turns UTF-8 on by itself in the C locale; here it may not.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN1 = {"PYTHONIOENCODING": "latin-1"}


def in_a_process(*words, **environment):
    """Exit code, output and errors, as bytes."""
    command = [sys.executable, "-m", "senet.cli", *words]
    run = subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "100", **environment}, check=False)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("environment", [ASCII, LATIN1], ids=["ascii", "latin-1"])
def test_tables_are_printed_with_the_marks_that_there_are(environment):
    code, out, err = in_a_process("cost", "se_resnet8", **environment)
    assert (code, err) == (0, b"")
    assert b"se_resnet8" in out
    assert b"32x32" in out if environment is ASCII else b"32\xd732" in out


def test_help_is_printed_in_ascii():
    code, out, err = in_a_process("compare", "--help", **ASCII)
    assert (code, err) == (0, b"")
    assert out.isascii()
    assert b"--seeds" in out


@pytest.mark.parametrize("environment", [ASCII, LATIN1, {}], ids=["ascii", "latin-1", "utf-8"])
def test_a_message_names_a_path_that_is_no_text(environment):
    code, out, err = in_a_process("train", "--model", "se_resnet8", "--data", "./caf\udce9", "-o", "out", **environment)
    assert (code, out) == (2, b"")
    assert err.startswith(b"error: caf")
    assert len(err.splitlines()) == 1


@pytest.fixture
def odd_photos(tmp_path):
    """Two classes whose names are no UTF-8, hold markup, an emoji's code, an escape sequence and a formula."""
    root = tmp_path / "caf\udce9 $[bold]:cat:$_^"
    rng = np.random.default_rng(0)
    for name in ("chi\udce9n [/x]", "=1+1 \x1b[31mred"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(os.fsencode(root / name / f"{number}.png").decode(errors="surrogateescape"))
    return root


def test_every_command_takes_names_that_are_no_text(senet, odd_photos, tmp_path):
    run, report, folded = tmp_path / "run [/x]", tmp_path / "report", tmp_path / "folded"
    checkpoint = run / "best.safetensors"
    data = ("--data", odd_photos)
    train = ("train", *data, "--model", "se_resnet8", "--epochs", "1", "--set", "batch_size=4", "-o", run)
    for words in (
        train,
        ("eval", *data, "--checkpoint", checkpoint),
        ("eval", *data, "--checkpoint", checkpoint, "--json"),
        ("predict", odd_photos, "--checkpoint", checkpoint),
        ("predict", odd_photos, "--checkpoint", checkpoint, "--csv", tmp_path / "predictions.csv"),
        ("inspect", *data, "--checkpoint", checkpoint, "-o", report),
        ("fold", *data, "--checkpoint", checkpoint, "-o", folded, "--max-drop", "100"),
    ):
        code, out, err = senet(*words)
        assert code == 0, (words[0], err)
        assert "\x1b" not in out + err, words[0]
        assert "\N{CAT}" not in out, "an emoji's code in a name is no emoji"
    named = (tmp_path / "predictions.csv").read_bytes()
    assert b"'=1+1" in named
    assert b"caf\xe9" in named, "a path opens again"
