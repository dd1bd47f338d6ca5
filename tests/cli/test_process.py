"""What only a process of its own can show: start-up time, signals, exit codes."""

import re
import signal
import subprocess
import sys

import pytest

from helpers.command import command


def test_help_imports_nothing_heavy():
    """What makes it quick; its time itself is measured, not tested."""
    subprocess.run(command("--help"), check=True, capture_output=True)
    code = "import sys; import senet.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "lightning", "torchvision", "pydantic", "yaml", "scipy"} & set(loaded)


def interrupted(words, number, folder):
    """Send a signal in a later epoch: (exit code, what was said before it, and after it)."""
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, cwd=folder)
    before = []
    try:
        for line in process.stderr:
            before.append(line)
            if re.search(r"epoch ([2-9]|\d\d)", line):
                process.send_signal(number)
                break
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in rest
    return process.returncode, "".join(before), rest


def test_a_signal_saves_and_says_how_to_go_on(photos, tmp_path):
    folder = tmp_path / "a run"  # with a space, which the printed command must quote
    words = ["train", "--data", photos, "--model", "se_resnet8", "--epochs", 500, "--set", "batch_size=4", "-o", folder]
    code, _, said = interrupted(words, signal.SIGINT, tmp_path)
    assert code == 130
    resume = re.search(r"continue with: (senet train --resume .*)", said)
    assert resume
    assert resume[1] == f"senet train --resume '{folder}'"
    assert (folder / "last.ckpt").exists()
    # The checkpoint is usable: the run goes on from where it was, until the next signal.
    code, said, rest = interrupted(["train", "--resume", folder], signal.SIGTERM, tmp_path)
    assert code == 143
    assert int(re.search(r"epoch (\d+)/500", said)[1]) >= 2
    assert resume[0] in rest


@pytest.mark.slow  # the others here are real commands as well, if shorter ones
def test_a_real_command_from_start_to_end(photos, tmp_path):
    words = ["compare", "--data", photos, "--model", "se_resnet8", "--epochs", 1, "--seeds", 1, "-o", tmp_path / "out"]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "one seed cannot say" in done.stdout


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(photos, tmp_path):
    words = ["--data", photos, "--model", "resnet8", "--epochs", 6, "--set", "batch_size=4", "--device", "cpu"]
    training = command("train", *words, "--devices", 2, "-o", tmp_path / "run")
    process = subprocess.Popen(training, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "epoch 2/" in line:
                process.send_signal(signal.SIGTERM)
                break
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in rest
    done = subprocess.run([*training, "--resume"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 6 epochs") == 1  # one process prints
    assert "epoch 2/6" not in done.stderr
