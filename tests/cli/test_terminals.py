"""Every terminal: encodings that lack our marks, and names that no encoding has."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from senet.cli.main import main

TABLE = ["cost", "se_resnet8"]
MISTAKE = ["train", "--model", "se_resnet8", "--data", "./caf\udce9", "-o", "out"]
# Python turns UTF-8 on by itself in the C locale; here it may not.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "100"}
IN_A_PROCESS = """
import sys
from senet.cli.main import main
for words in sys.argv[1:]:
    print(main(words.split("\\n")), end="\\0", flush=True)
    print(end="\\0", file=sys.stderr, flush=True)
"""


@pytest.fixture
def encoded(monkeypatch):
    """Run the command line on streams of an encoding, as Python opens them: (exit code, output, errors), in bytes."""

    def call(encoding, *words):
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", "100")
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
            patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding, "backslashreplace"))
            code = main(list(words))
            sys.stdout.flush()
            sys.stderr.flush()
            return code, out.getvalue(), err.getvalue()

    return call


def test_a_terminal_of_ascii():
    """In a process of its own, as the locale decides about its arguments and files, too."""
    words = ["\n".join(words) for words in (TABLE, ["compare", "--help"], MISTAKE)]
    command = [sys.executable, "-c", IN_A_PROCESS, *words]
    run = subprocess.run(command, capture_output=True, env={**os.environ, **ASCII}, check=True)
    (table, usage, mistake), errors = run.stdout.split(b"\0")[:3], run.stderr.split(b"\0")
    assert table.endswith(b"0")
    assert b"se_resnet8" in table
    assert b"32x32" in table
    assert usage.endswith(b"0")
    assert usage.isascii()
    assert b"--seeds" in usage
    assert (mistake, errors[:2]) == (b"2", [b"", b""])
    assert errors[2].startswith(b"error: caf")
    assert len(errors[2].splitlines()) == 1


def test_tables_are_printed_with_the_marks_that_there_are(encoded):
    code, out, err = encoded("latin-1", *TABLE)
    assert (code, err) == (0, b"")
    assert b"se_resnet8" in out
    assert b"32\xd732" in out


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_message_names_a_path_that_is_no_text(encoded, encoding):
    code, out, err = encoded(encoding, *MISTAKE)
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
