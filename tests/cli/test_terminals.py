"""Every terminal: encodings that lack our marks, and names that no encoding has."""

import os
import subprocess
import sys

import pytest

# Python turns UTF-8 on by itself in the C locale; here it may not.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN1 = {"PYTHONIOENCODING": "latin-1"}


def senet(*words, **environment):
    """Exit code, output and errors, as bytes."""
    command = [sys.executable, "-m", "senet.cli", *words]
    run = subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "100", **environment}, check=False)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("environment", [ASCII, LATIN1], ids=["ascii", "latin-1"])
def test_tables_are_printed_with_the_marks_that_there_are(environment):
    code, out, err = senet("cost", "se_resnet8", **environment)
    assert (code, err) == (0, b"")
    assert b"se_resnet8" in out
    assert b"32x32" in out if environment is ASCII else b"32\xd732" in out


def test_help_is_printed_in_ascii():
    code, out, err = senet("compare", "--help", **ASCII)
    assert (code, err) == (0, b"")
    assert out.isascii()
    assert b"--seeds" in out


@pytest.mark.parametrize("environment", [ASCII, LATIN1, {}], ids=["ascii", "latin-1", "utf-8"])
def test_a_message_names_a_path_that_is_no_text(environment):
    code, out, err = senet("train", "--model", "se_resnet8", "--data", "./caf\udce9", "-o", "out", **environment)
    assert (code, out) == (2, b"")
    assert err.startswith(b"error: caf")
    assert len(err.splitlines()) == 1
