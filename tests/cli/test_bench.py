"""`senet bench`: what it prints and writes, and how it refuses."""

import csv
import json

import pytest
import torch

from senet.bench import tax

TINY = ("bench", "se_resnet8", "--size", 16, "--batch", 2, "--rounds", 2, "--device", "cpu", "--candidates")


def test_table_and_files(senet, tmp_path):
    code, out, err = senet(*TINY, "se-reference", "--batch", 3, "-o", tmp_path / "tax")
    assert (code, err) == (0, "")
    for word in ("train step, batch 2", "train step, batch 3", "inference, batch 3", "se-reference", "÷ its twin"):
        assert word in out
    assert out.count("outputs of 2 agree with float64") == 4
    with (tmp_path / "tax" / "tax.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["batch"]) for row in rows[::2]] == [
        ("train", "2"),
        ("train", "3"),
        ("inference", "2"),
        ("inference", "3"),
    ]
    se = rows[1]
    assert float(se["over_plain_q25"]) <= float(se["over_plain"]) <= float(se["over_plain_q75"])
    assert json.loads((tmp_path / "tax" / "tax.json").read_text())["complete"] is True
    assert (tmp_path / "tax" / "tax.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_overwritten(senet, tmp_path):
    (tmp_path / "tax.json").write_text("mine")
    code, out, err = senet(*TINY, "plain-eager", "-o", tmp_path)
    assert (code, out) == (2, "")
    assert "tax.json already exists" in err
    assert senet(*TINY, "plain-eager", "--mode", "inference", "-o", tmp_path, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "tax.json").read_text())["complete"] is True


def test_explain_names_each_gate_in_both_modes_and_times_nothing(senet):
    code, out, err = senet("bench", "se_resnet8", "--size", 16, "--batch", 2, "--explain")
    assert (code, err) == (0, "")
    for word in ("se_resnet8, batch 2", "inference", "training", "layer1.0.se", "layer2.0.se", "layer3.0.se"):
        assert word in out
    assert "÷" not in out


def test_threads_are_set(senet):
    before = torch.get_num_threads()
    try:
        assert senet(*TINY, "plain-eager", "--mode", "inference", "--threads", 1)[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "se_resnet9"), "did you mean"),
        (("bench", "--candidates", "se-slow"), "'se-slow'"),
        (("bench", "--batch", "0"), "--batch 0"),
        (("bench", "--rounds", "0"), "--rounds 0"),
        (("bench", "--threads", "0"), "--threads 0"),
        (("bench", "--dtype", "int8"), "int8"),
        (("bench", "--explain", "--output", "tax"), "omit --output"),
        (("bench", "se_resnet8", "--size", "4", "--batch", "1", "--mode", "train"), "one value per channel"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(senet, words, message):
    code, out, err = senet(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_failed_check_is_one_line_and_nothing_is_timed(senet, tmp_path, monkeypatch):
    monkeypatch.setattr("senet.bench.checks.OUTPUTS", 0.0)
    monkeypatch.setattr("senet.bench.checks.MARGIN", 0.0)
    code, out, err = senet(*TINY, "se-reference", "--mode", "inference", "-o", tmp_path / "tax")
    assert code == 2
    assert err.count("\n") == 1
    assert "nothing was timed" in err
    assert "do not agree" in out
    assert "÷" not in out
    assert not (tmp_path / "tax").exists()


def test_ctrl_c_keeps_what_was_measured(senet, tmp_path, monkeypatch):
    original = tax.interleaved

    def stopped(*args, on_round, **kwargs):
        def once(timings):
            on_round(timings)
            raise KeyboardInterrupt

        return original(*args, on_round=once, **kwargs)

    monkeypatch.setattr(tax, "interleaved", stopped)
    code, out, err = senet(*TINY, "se-reference", "-o", tmp_path / "tax")
    assert code == 130
    assert "Traceback" not in err
    assert "1 rounds (stopped early)" in out
    content = json.loads((tmp_path / "tax" / "tax.json").read_text())
    assert content["complete"] is False
    assert content["settings"][0]["rows"][1]["rounds"] == 1
