"""Output folders: nothing of the user's is lost, one command at a time, and a killed one can be repeated."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from helpers.messages import one_line
from senet.comparison.compare import compare
from senet.errors import InputError
from senet.inspection.command import check_output
from senet.runs.lock import LOCK, locked
from senet.runs.outputs import refuse_inside
from senet.runs.settings import RunSettings
from senet.training.interrupt import Interrupted, StopRequest
from senet.training.processes import check_processes
from senet.training.run import train

HOLD = "import sys; from pathlib import Path; from senet.runs.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)


@contextmanager
def held(folder):
    """Another process at work in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=-1, stdout=-1)
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder, *names):
    """Files of the user's, and what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return {name: f"mine: {name}".encode() for name in names}


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(pictures, quick_recipe, tmp_path, caplog):
    folder, settings = tmp_path / "run", RunSettings(str(pictures), "resnet8")
    train(settings, quick_recipe("epochs=1"), folder)
    old = contents(folder)
    mine = put(folder, "notes.md", "photos/a.jpg", "photos/b.jpg", "tensorboard/c.png", "steps/d.txt", "run.json.bak")
    elsewhere = put(tmp_path / "elsewhere", "metrics.csv")
    (folder / "steps" / "version_9").symlink_to(tmp_path / "elsewhere")  # a link is the user's, and what lies behind it
    with caplog.at_level(logging.WARNING, "senet"):
        train(settings, quick_recipe("epochs=1", "lr=0.1"), folder, overwrite=True, loggers=False)
    after = contents(folder)
    assert after.items() >= mine.items()
    assert contents(tmp_path / "elsewhere") == elsewhere
    assert (folder / "steps" / "version_9").is_symlink()
    # Of the old run nothing is left: all that two runs have in common has been written anew, the logs have gone.
    assert set(after) - set(mine) == {name for name in old if "/" not in name}
    assert after["last.ckpt"] != old["last.ckpt"]
    (said,) = [record.getMessage() for record in caplog.records if "kept" in record.getMessage()]
    assert "7 files" in said
    assert "notes.md" in said


def test_a_run_alone_in_its_folder_leaves_nothing(pictures, quick_recipe, tmp_path, caplog):
    settings, recipe = RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1")
    train(settings, recipe, tmp_path / "run")
    with caplog.at_level(logging.WARNING, "senet"):
        train(settings, recipe, tmp_path / "run", overwrite=True, loggers=False)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "steps").exists()
    assert not [record for record in caplog.records if "kept" in record.getMessage()]


def test_a_comparison_keeps_notes_at_every_depth(pictures, quick_recipe, tmp_path):
    settings, folder = RunSettings(str(pictures), "resnet8"), tmp_path / "out"
    compare(settings, quick_recipe("epochs=1"), folder, seeds=1)
    names = ("notes.md", "runs/mine/run.json", "runs/resnet8-seed0/why.txt", "runs/resnet8-seed7/notes.md")
    mine = put(folder, *names)
    compare(settings, quick_recipe("epochs=1", "lr=0.1"), folder, seeds=1, overwrite=True)
    assert contents(folder).items() >= mine.items()
    assert "lr: 0.1" in (folder / "runs" / "resnet8-seed0" / "recipe.yaml").read_text()
    with held(folder / "runs" / "resnet8-seed0"):  # resumed by itself, say
        before = contents(folder)
        with pytest.raises(InputError, match=one_line("resnet8-seed0 … in use")):
            compare(settings, quick_recipe("epochs=1"), folder, seeds=1, overwrite=True)
        assert contents(folder) == before


def test_what_the_command_reads_must_not_lie_in_the_folder(pictures, quick_recipe, tmp_path):
    folder, settings = tmp_path / "run", RunSettings(str(pictures), "resnet8")
    train(settings, quick_recipe("epochs=1"), folder, loggers=False)
    (folder / "photos").symlink_to(pictures)
    put(folder, "mine.yaml")
    before = contents(folder)
    weights = RunSettings(str(pictures), "resnet8", pretrained=str(folder / "best.safetensors"))
    with pytest.raises(InputError, match=one_line("--pretrained … best.safetensors … run")):
        train(weights, quick_recipe("epochs=1"), folder, overwrite=True, loggers=False)
    with pytest.raises(InputError, match=r"--recipe .* is in"):
        refuse_inside(folder, {"--recipe": str(folder / ".." / "run" / "mine.yaml")})
    refuse_inside(folder, {"--recipe": "cifar", "--pretrained": None, "--data": str(pictures)})
    assert contents(folder) == before
    (folder / "photos").unlink()
    (folder / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--data .*photos is in"):
        refuse_inside(folder, {"--data": folder / "photos"})
    with pytest.raises(InputError, match=one_line("--checkpoint … best.safetensors")):
        check_output(folder, True, ("best.safetensors",), {"--checkpoint": folder / "best.safetensors"})


def test_one_command_at_a_time(pictures, quick_recipe, tmp_path):
    folder, settings, recipe = tmp_path / "run", RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1")
    train(settings, recipe, folder, loggers=False)
    (folder / "result.json").unlink()  # as in the middle of the run
    before = contents(folder)
    with held(folder) as other:
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(InputError, match=one_line(f"in use … process {other.pid}")):
                train(settings, recipe, folder, loggers=False, **options)
        with pytest.raises(InputError, match="in use by process"):
            compare(settings, recipe, folder, overwrite=True)
        after = contents(folder)
        assert json.loads(after.pop(LOCK))["process"] == other.pid
        assert after == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        train(settings, recipe, folder, resume=True, loggers=False)  # whatever ended the other, the lock is free
    assert not (folder / LOCK).exists()


def test_a_lock_is_not_inherited_and_leaves_no_folder(tmp_path):
    with locked(tmp_path / "new" / "run"):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        assert not (tmp_path / "new" / "run").exists()
        with locked(tmp_path / "new" / "run"):
            assert (tmp_path / "new" / "run" / LOCK).exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_run_killed_while_its_folder_was_made_can_be_started_again(pictures, quick_recipe, tmp_path):
    settings, recipe = RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1")
    leftovers = {"new": [LOCK, "recipe.yaml", ".senet.elsewhere.1.0123abcd.tmp", "notes.md"], "old": ["recipe.yaml"]}
    for name, files in leftovers.items():
        put(tmp_path / name, *files)
        if name == "old":  # of the version without a lock
            (tmp_path / name / ".run.json.ab12_xyz").touch(mode=0o600)
        for options in ({}, {"resume": True}):
            train(settings, recipe, tmp_path / name, loggers=False, **options)
        assert (tmp_path / name / "result.json").exists()
        hidden = {path.name for path in (tmp_path / name).glob(".*")}
        assert hidden <= {".senet.elsewhere.1.0123abcd.tmp"}  # whose process may live
    assert (tmp_path / "new" / "notes.md").exists()
    put(tmp_path / "new", LOCK)  # killed when all was done
    train(settings, recipe, tmp_path / "new", loggers=False, resume=True)
    assert not (tmp_path / "new" / LOCK).exists()


@pytest.mark.parametrize(
    "files",
    [
        ["recipe.yaml"],  # the user's own
        ["recipe.yaml", "log.txt", ".senet.elsewhere.1.0123abcd.tmp"],  # a killed command had written beside them
        [LOCK, "compare.json", "curves.png"],  # a killed comparison
        [LOCK, "best.safetensors"],
        ["recipe.yaml", ".run.json.ab12_xyz"],  # a copy of a user's: another mode
    ],
)
def test_a_folder_with_something_to_lose_is_no_begun_run(pictures, quick_recipe, tmp_path, files):
    mine = put(tmp_path / "mine", *files)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="not from this command"):
            train(RunSettings(str(pictures), "resnet8"), quick_recipe(), tmp_path / "mine", **options)
    assert contents(tmp_path / "mine") == mine


def test_a_state_does_not_pass_through_tmpdir(pictures, quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # not even there
    train(RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "run", loggers=False)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_a_full_disk_names_the_file_and_can_be_resumed(pictures, quick_recipe, tmp_path):
    settings, recipe, folder = RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # a state has 625 kB
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            train(settings, recipe, folder, loggers=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(folder / "last.ckpt")
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.name == "last.ckpt"]
    train(settings, recipe, folder, loggers=False, resume=True)


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """A run that has been stopped, and its recipe."""
    from senet.runs.recipe import load_recipe

    recipe, folder = load_recipe("cifar", ["epochs=1", "batch_size=8"]), tmp_path_factory.mktemp("stopped") / "run"
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Interrupted):
        train(RunSettings(str(pictures), "resnet8"), recipe, folder, stop=stop, loggers=False)
    return folder, recipe


def without(*keys, value=None):
    def change(state):
        place = state
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        return state

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("state_dict"),
        without("callbacks"),
        without("callbacks", value=[]),
        without("callbacks", "StateSaver"),
        without("callbacks", "Recorder", "rows", value=[{"epoch": 1}]),
        without("callbacks", "StateSaver", "random", "torch", value="x"),
        without("callbacks", "StateSaver", "random", "torch", value=torch.zeros(3, dtype=torch.uint8)),
        without("loops", "fit_loop"),
        without("loops", "fit_loop", "epoch_progress", value=7),
        without("optimizer_states"),
        without("optimizer_states", value=[None]),
        without("lr_schedulers", 0, value="x"),
        without("state_dict", "model.fc.weight", value=torch.zeros(1)),
        lambda state: list(state),
    ],
)
def test_a_state_of_other_content_is_one_line(pictures, stopped, change):
    folder, recipe = stopped
    good = (folder / "last.ckpt").read_bytes()
    torch.save(change(torch.load(folder / "last.ckpt", weights_only=True)), folder / "last.ckpt")
    try:
        with pytest.raises(InputError, match=r"last\.ckpt .*--overwrite$"):
            train(RunSettings(str(pictures), "resnet8"), recipe, folder, resume=True, loggers=False)
    finally:
        (folder / "last.ckpt").write_bytes(good)


def test_what_the_machine_lacks_is_not_the_states_fault(pictures, stopped, monkeypatch):
    folder, recipe = stopped
    for error in (RuntimeError("DefaultCPUAllocator: not enough memory: 5 bytes"), MemoryError()):
        for name in ("torch.load", "senet.training.callbacks.Recorder.load_state_dict"):
            with monkeypatch.context() as patch:
                patch.setattr(name, Mock(side_effect=error))
                with pytest.raises(type(error)) as caught:
                    train(RunSettings(str(pictures), "resnet8"), recipe, folder, resume=True, loggers=False)
            assert caught.value is error


def test_a_state_cut_off_or_changed_anywhere_is_one_line(stopped):
    from senet.training.state import checked_state

    folder, _ = stopped
    good, path = (folder / "last.ckpt").read_bytes(), folder / "last.ckpt"
    try:
        assert checked_state(path) == path
        for number in range(12):
            place = len(good) * number // 12
            for damaged in (good[:place], good[:place] + b"\xa5" * 300 + good[place + 300 :]):
                path.write_bytes(damaged)
                with pytest.raises(InputError, match=r"last\.ckpt.*--overwrite$"):
                    checked_state(path)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("variables", "devices", "said"),
    [
        ({"RANK": "1"}, 1, "RANK=1 .* unset RANK"),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 1, "unset LOCAL_RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, 1, "unset WORLD_SIZE"),
        ({"RANK": "1"}, 2, "unset RANK"),
        ({"SLURM_PROCID": "3"}, 1, "unset SLURM_PROCID"),
        ({"RANK": "x"}, 1, "RANK='x' .* not a number"),
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}, 1, "torchrun started 2"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, 2, "srun started 4"),
    ],
)
def test_ranks_of_no_launcher_are_named(monkeypatch, variables, devices, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        check_processes(devices, 1)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, 1),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, 2),  # Lightning's own second process
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, 2),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 2),
    ],
)
def test_ranks_of_a_launcher_are_taken(monkeypatch, variables, devices):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_processes(devices, 1)


def test_what_salloc_leaves_starts_no_processes(pictures, quick_recipe, tmp_path, monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine"}.items():
        monkeypatch.setenv(name, value)
    train(RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "run", loggers=False)
    assert (tmp_path / "run" / "result.json").exists()


def test_a_launcher_that_does_not_fit_is_found_before_an_old_run_is_removed(
    pictures, quick_recipe, tmp_path, monkeypatch
):
    settings, recipe, folder = RunSettings(str(pictures), "resnet8"), quick_recipe("epochs=1"), tmp_path / "run"
    train(settings, recipe, folder, loggers=False)
    before = contents(folder)
    for name, value in {"STEP_ID": "0", "STEP_NUM_TASKS": "2", "NTASKS": "2", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # Lightning wants the tasks per node as well
    with pytest.raises(InputError, match="ntasks"):
        train(replace(settings, devices=2, device="cpu"), recipe, folder, overwrite=True)
    assert contents(folder) == before
