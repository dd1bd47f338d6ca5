"""Readers that leave, terminals that close, streams that were never open: no traceback, and no run is lost."""

import errno
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager

import pytest

from helpers.command import command
from senet.cli.main import main
from senet.cli.streams import ReaderGone, steady_streams


def train_command(photos, folder, epochs):
    words = ["train", "--data", photos, "--model", "se_resnet8", "--epochs", epochs, "--set", "batch_size=4"]
    return command(*words, "-o", folder)


@contextmanager
def deserted(monkeypatch):
    """The output and the errors of this process go into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield stream


def test_what_cannot_be_shown_is_dropped(monkeypatch):
    with deserted(monkeypatch) as stream:
        with steady_streams(finish=True):
            print("result", flush=True)
            print("progress", file=sys.stderr, flush=True)
            print("more", flush=True)
        assert sys.stdout is stream


def test_a_listing_ends_when_nobody_reads(monkeypatch):
    with deserted(monkeypatch), pytest.raises(ReaderGone), steady_streams(finish=False):
        print("row", flush=True)


def test_a_full_disk_is_no_reader_that_has_gone(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        with steady_streams(finish=True), pytest.raises(OSError, match="No space"):
            print("result")


def test_closed_streams_are_no_error(tmp_path):
    code = "import sys, senet.cli.main as m; open(sys.argv[1], 'w').write(str(m.main(['--version'])))"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(tmp_path / "code")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "code").read_text() == "0"


def test_a_table_for_closed_streams_is_no_error(monkeypatch):
    names = ("stdin", "stdout", "stderr")
    for name in names:
        monkeypatch.setattr(sys, name, None)  # what Python makes of them
    assert main(["list", "se_resnet1*"]) == 0
    for name in names:
        getattr(sys, name).close()  # the null device, which a process keeps until its end


def test_a_command_without_a_reader_ends_with_0(monkeypatch):
    with deserted(monkeypatch):
        assert main(["list", "se_resnet1*"]) == 0


def test_a_run_outlives_the_reader_of_its_progress(photos, tmp_path):
    """``senet train … 2>&1 | head -1``."""
    process = subprocess.Popen(
        train_command(photos, tmp_path / "run", 3), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert "epoch 1/3" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 3


def test_a_run_is_saved_when_its_terminal_is_closed(photos, tmp_path):
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        train_command(photos, tmp_path / "run", 5000),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    try:
        seen = b""
        while not re.search(rb"epoch [1-9]\d+/5000", seen):  # the bar does not show every epoch
            seen = seen[-200:] + os.read(terminal, 4096)
        os.close(terminal)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert (tmp_path / "run" / "last.ckpt").exists()
    assert "Traceback" not in (tmp_path / "run" / "log.txt").read_text()
