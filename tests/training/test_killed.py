"""``kill -9`` at random moments: every run goes on, ends as if nothing had happened, and leaves no rubbish."""

import csv
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from helpers.command import command
from senet.runs.lock import LOCK

KILLS = 12
WORDS = ["train", "--data", "digits", "--model", "se_resnet8", "--epochs", "6", "--set", "ema=0.99"]


def start(folder):
    training = command(*WORDS, "--resume", "-o", folder)
    return subprocess.Popen(training, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_lock(process, folder):
    """Before it holds the folder, it changes nothing."""
    holder = f'"process": {process.pid},'
    while process.poll() is None and holder not in text_of(folder / LOCK):
        time.sleep(0.001)


def text_of(path):
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def outcome(folder):
    with (folder / "curves.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    weights = [(folder / name).read_bytes() for name in ("best.safetensors", "last.safetensors")]
    state = torch.load(folder / "last.ckpt", weights_only=True)
    return rows, weights, state["state_dict"], state["optimizer_states"], state["lr_schedulers"]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_an_unbroken_one(tmp_path):
    whole = start(tmp_path / "whole")
    wait_for_lock(whole, tmp_path / "whole")
    begun = time.monotonic()
    _, said = whole.communicate(timeout=300)
    seconds = time.monotonic() - begun
    assert whole.returncode == 0, said.decode()
    expected = outcome(tmp_path / "whole")
    moments = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        while True:
            process = start(folder)
            wait_for_lock(process, folder)
            if kills < KILLS:
                # A third of them while the folder is being made, or opened again.
                time.sleep(moments.uniform(0, 0.05 if kills % 3 == 0 else 0.6 * seconds))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
            _, said = process.communicate(timeout=300)
            assert process.returncode in (0, -signal.SIGKILL), said.decode()
            if process.returncode == 0:
                break
        assert same(outcome(folder), expected), folder
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        runs += 1
