"""Files of earlier versions (see make_fixtures.py) load, resume and evaluate to the numbers of their day.

How exact a comparison is depends on what another processor or another release of PyTorch may change:

- Loaded weights and excitations: nothing, so they are compared bit by bit.
- Outputs in double precision (EXACT): the order of sums, 1e-16 of them.
- Outputs in float32 (ROUNDED): the same; 8e-7 of them was seen.
- Weights and losses at the end of a resumed run (RESUMED): rounding that up to 42 steps of training have grown; with
  AVX-512, AVX2 or neither, one thread or two, and both CPU backends, 5e-7 of them was seen. A run that resumes without
  its momentum, its average, its random numbers or its place in the schedule is off by 3e-5 to 2.
- Errors of a resumed run: one image may change sides.
"""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import senet

BEFORE = Path(__file__).parent / "written_by_0.1.0.dev0"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
RESUMED = {"rtol": 1e-5, "atol": 1e-5}
HERE = ("--workers", 0, "--device", "cpu")
DIGITS = ("--data", "digits", *HERE)

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def copied(tmp_path):
    """A file or folder of the version before, to write to."""

    def copy(name):
        source = BEFORE / name
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name))

    return copy


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(path, expected):
    (now, metadata), (before, metadata_before) = senet.load_weights(path), senet.load_weights(expected)
    torch.testing.assert_close(now, before, **RESUMED)
    assert metadata.keys() == metadata_before.keys()
    for name in metadata.keys() - {"metrics"}:
        assert metadata[name] == metadata_before[name]


def assert_same_curves(folder, expected, images):
    """Equal rows but for rounding; an error may differ by one image in ``images``."""
    both = [list(csv.DictReader((place / "curves.csv").read_text().splitlines())) for place in (folder, expected)]
    assert len(both[0]) == len(both[1]) == 2
    for now, before in zip(*both, strict=True):
        assert now.keys() == before.keys()
        for name in now.keys() - {"seconds"}:
            tolerance = {"abs": 1.01 * 100 / images} if name.endswith("error") else {"abs": 1e-5, "rel": 1e-5}
            assert float(now[name]) == pytest.approx(float(before[name]), **tolerance), name


@pytest.mark.parametrize("name", EXPECTED["networks"])
def test_a_saved_network_is_the_same(name, digest_of, logits_of):
    network = senet.from_pretrained(BEFORE / name)
    expected = torch.tensor(EXPECTED["networks"][name]["logits"], dtype=torch.float64)
    assert digest_of(network.state_dict()) == EXPECTED["networks"][name]["sha256"]
    torch.testing.assert_close(logits_of(network, torch.float32).double(), expected, **ROUNDED)
    torch.testing.assert_close(logits_of(network, torch.float64), expected, **EXACT)


@pytest.mark.parametrize("name", [name for name in EXPECTED["networks"] if name.endswith(".safetensors")])
def test_its_file_says_how_it_is_made(name, digest_of, tmp_path):
    network, metadata = senet.build_from_checkpoint(BEFORE / name)
    assert digest_of(network.state_dict()) == EXPECTED["networks"][name]["sha256"]
    senet.save(network, tmp_path / "again.safetensors", metadata)
    again, now = senet.build_from_checkpoint(tmp_path / "again.safetensors")
    assert digest_of(again.state_dict()) == EXPECTED["networks"][name]["sha256"]
    assert {key: now.get(key) for key in metadata} == metadata


def test_weights_without_metadata_load_into_their_network(digest_of):
    network = senet.create_model("se_tiny", 10, 1, pretrained=str(BEFORE / "weights_alone.safetensors"))
    assert digest_of(network.state_dict()) == EXPECTED["networks"]["run/best.safetensors"]["sha256"]


def test_every_network_has_the_keys_and_shapes_that_it_had(digest_of):
    for name, expected in EXPECTED["keys"].items():
        with torch.device("meta"):
            assert digest_of(senet.create_model(name).state_dict()) == expected, name


@pytest.mark.parametrize("name", EXPECTED["eval"])
def test_eval_counts_the_same_errors(name, command):
    code, output, _ = command("eval", "--checkpoint", BEFORE / name, *DIGITS, "--json")
    assert code == 0
    found = json.loads(output)
    assert {key: found[key] for key in EXPECTED["eval"][name]} == EXPECTED["eval"][name]


def test_predict_gives_the_same_answers(command, monkeypatch):
    monkeypatch.chdir(BEFORE)
    words = ("-c", "moved_run_at_its_end.safetensors", "pictures", "--csv", "-", *HERE)
    code, output, _ = command("predict", *words)
    assert code == 0
    now, before = list(csv.reader(io.StringIO(output))), EXPECTED["predict"]
    assert now[0] == before[0]
    assert [row[:-1] for row in now] == [row[:-1] for row in before]
    assert [float(row[-1]) for row in now[1:]] == pytest.approx([float(row[-1]) for row in before[1:]], abs=1e-5)


def test_a_stopped_run_resumes_to_the_end_of_the_unbroken_one(copied, command):
    folder = copied("run_stopped")
    code, _, _ = command("train", "--resume", folder, *HERE)
    assert code == 0
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_weights(folder / name, BEFORE / "run" / name)
    assert_same_curves(folder, BEFORE / "run", images=359)
    now, before = (json.loads((place / "result.json").read_text()) for place in (folder, BEFORE / "run"))
    assert now.keys() == before.keys()
    assert now["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5, rel=1e-5)


def test_a_finished_run_is_left_as_it_is(copied, command):
    folder = copied("run")
    before = contents(folder)
    code, output, _ = command("train", "--resume", folder)
    assert code == 0
    assert f"{json.loads(before['result.json'])['val_error']:.2f}" in output
    assert contents(folder) == before


def test_a_stopped_run_of_an_attached_network_resumes(copied, command):
    folder = copied("attached_run_stopped")
    code, _, _ = command("train", "--resume", folder, *HERE)
    assert code == 0
    assert_same_weights(folder / "last.safetensors", BEFORE / "attached_run_at_its_end.safetensors")


def test_a_run_whose_images_have_moved_asks_for_them_and_resumes(copied, command):
    folder = copied("moved_run_stopped")
    before = contents(folder)
    code, _, error = command("train", "--resume", folder)
    assert code == 2
    assert "--data" in error
    assert contents(folder) == before
    code, _, _ = command("train", "--resume", folder, "--data", copied("pictures"), *HERE)
    assert code == 0
    assert_same_weights(folder / "last.safetensors", BEFORE / "moved_run_at_its_end.safetensors")


COMPARE = ("compare", *DIGITS, "--model", "se_tiny", "--seeds", 1, "--epochs", 2, "--resume")
COMPARE += ("--limit-batches", 12, "--set", "batch_size=32", "--set", "lr=0.2")


def test_a_stopped_comparison_resumes_and_repeats_nothing(copied, command):
    folder = copied("comparison_stopped")
    finished = contents(folder / "runs" / "tiny-seed0")
    code, _, _ = command(*COMPARE, "--output", folder)
    assert code == 0
    assert contents(folder / "runs" / "tiny-seed0") == finished
    side = Path("runs", "se_tiny-seed0")
    assert_same_weights(folder / side / "last.safetensors", BEFORE / "comparison" / side / "last.safetensors")
    assert_same_curves(folder / side, BEFORE / "comparison" / side, images=359)
    assert_same_comparison(folder)


def test_a_finished_comparison_gives_the_same_answer(copied, command):
    folder = copied("comparison")
    runs = contents(folder / "runs")
    code, output, _ = command(*COMPARE, "--output", folder)
    assert code == 0
    assert EXPECTED["verdict"] in output
    assert contents(folder / "runs") == runs
    assert_same_comparison(folder)


def assert_same_comparison(folder):
    now, before = (json.loads((place / "results.json").read_text()) for place in (folder, BEFORE / "comparison"))
    assert now.keys() == before.keys()
    assert now["verdict"] == before["verdict"]
    assert now["difference"]["mean"] == pytest.approx(before["difference"]["mean"], abs=1.01 * 100 / 359)
    for side in ("plain", "se"):
        assert now[side]["cost"] == before[side]["cost"]


def test_excitations_load():
    npz, parquet = (senet.Excitations.load(BEFORE / f"excitations.{ending}") for ending in ("npz", "parquet"))
    for found in (npz, parquet):
        assert [site.name for site in found] == list(EXPECTED["excitations"])
        for site in found:
            assert site.overall()[0].tolist() == pytest.approx(EXPECTED["excitations"][site.name], rel=1e-12)
        assert found.images == 60
    for one, other in zip(npz, parquet, strict=True):
        for name in ("count", "mean", "m2", "lowest", "highest"):
            assert (getattr(one, name) == getattr(other, name)).all(), name
        assert (one.opening.images == other.opening.images).all()


def test_fold_reads_the_run_and_its_excitations(command, tmp_path):
    words = ("--checkpoint", BEFORE / "run/best.safetensors", "--excitations", BEFORE / "excitations.npz", *DIGITS)
    code, _, _ = command("fold", *words, "--sites", "layer2.*", "--rounds", 0, "--output", tmp_path / "fold")
    assert code == 0
    now, _ = senet.load_weights(tmp_path / "fold" / "folded.safetensors")
    before, _ = senet.load_weights(BEFORE / "folded.safetensors")
    torch.testing.assert_close(now, before, rtol=1e-6, atol=1e-6)


def test_inspect_reads_the_run(command, tmp_path):
    code, _, _ = command("inspect", "--checkpoint", BEFORE / "run/best.safetensors", *DIGITS, "--output", tmp_path)
    assert code == 0
    found = senet.Excitations.load(tmp_path / "excitations.npz")
    assert [site.name for site in found] == list(EXPECTED["excitations"])
    assert found.images == EXPECTED["eval"]["run/best.safetensors"]["images"]
