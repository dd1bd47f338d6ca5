"""`senet cost`: what it prints and writes, and how it refuses."""

import csv
import io
import json

import pytest

from senet import SEConfig, create_model, save_weights
from senet.cli import cost_tables
from senet.measure.cost import model_cost


def test_a_network_beside_its_twin_in_every_form(senet, tmp_path):
    code, out, err = senet("cost", "resnet8")
    assert (code, err) == (0, "")
    for words in ("se_resnet8 and its plain twin", "32×32", "SE adds", "with running statistics", "kept for backward"):
        assert words in out
    assert f"{model_cost('se_resnet8').params:,}" in out
    rows = json.loads(senet("cost", "se_resnet8", "--format", "json")[1])
    assert [row["model"] for row in rows] == ["resnet8", "se_resnet8"]
    assert rows[1]["mult_adds"] == model_cost("se_resnet8").mult_adds
    assert rows[1]["saved_bytes"] > rows[0]["saved_bytes"] > rows[0]["peak_bytes"] > 0
    file = tmp_path / "cost.csv"
    assert senet("cost", "se_resnet8", "--format", "csv", "-o", file) == (0, "", "")
    with file.open(newline="") as handle:
        assert [row["params"] for row in csv.DictReader(handle)] == [str(row["params"]) for row in rows]


def test_parts_add_up(senet):
    assert "stage 4" in senet("cost", "se_resnet8", "--per", "stage")[1]
    rows = json.loads(senet("cost", "se_resnet8", "--per", "block", "--input-size", 16, "--format", "json")[1])
    assert [row["part"] for row in rows] == ["stem", "layer1.0", "layer2.0", "layer3.0", "head"]
    assert sum(row["mult_adds"] for row in rows) == model_cost("se_resnet8", input_size=16).mult_adds


def test_a_weight_file_says_what_it_holds(senet, tmp_path):
    se = SEConfig(reduction=4)
    model, file = create_model("se_resnet8", 7, 1, se=se), tmp_path / "weights.safetensors"
    save_weights(file, model, {"model": "se_resnet8", "num_classes": 7, "in_chans": 1, "se": se.to_dict()})
    rows = json.loads(senet("cost", file, "--format", "json")[1])
    assert rows[1]["params"] == sum(p.numel() for p in model.parameters())
    assert rows[0]["params"] == sum(p.numel() for p in create_model("resnet8", 7, 1).parameters())
    save_weights(file, model)
    assert "nothing says which network" in senet("cost", file)[2]


def test_the_papers_figures_beside_ours(senet):
    code, out, err = senet("cost", "se_shufflenet_v1_g3", "--vs-paper")
    assert (code, err) == (0, "")
    for words in ("Table 3", "SE-ShuffleNet", "142", "139.68", "(1)", "cut off"):
        assert words in out
    rows = json.loads(senet("cost", "senet154", "--vs-paper", "--format", "json")[1])
    (row,) = rows
    assert (row["printed"], row["agrees"], round(row["ours"])) == ("440", True, 440)


def test_everything_and_everything_published(senet, monkeypatch):
    monkeypatch.setattr(cost_tables, "list_models", lambda: ["resnet8", "se_resnet8", "inception_v3"])
    assert "se_resnet8" in senet("cost", "--all")[1]
    rows = list(csv.DictReader(io.StringIO(senet("cost", "--all", "--input-size", 32, "--format", "csv")[1])))
    assert [row["model"] for row in rows] == ["resnet8", "se_resnet8"], "inception_v3 needs larger images"
    out = senet("cost", "--all", "--vs-paper")[1]
    for words in ("Table 2", "Inception-ResNet-v2", "11.75", "13.1558", "+1.41", "Table 16", "NoSqueeze", "SENet-154"):
        assert words in out


def test_nothing_is_overwritten(senet, tmp_path):
    file = tmp_path / "cost.json"
    file.write_text("mine")
    words = ("cost", "se_resnet8", "--format", "json", "--output", file)
    assert "exists" in senet(*words)[2]
    assert file.read_text() == "mine"
    assert senet(*words, "--overwrite")[0] == 0
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say which network"),
        (("se_resnet8", "--all"), "say which network"),
        (("se_resnet9",), "did you mean"),
        (("se_resnet9", "--vs-paper"), "did you mean"),
        (("resnet20", "--vs-paper"), "prints no cost of 'resnet20'"),
        (("se_resnet50", "--vs-paper", "--input-size", "64"), "leave --input-size out"),
        (("--all", "--per", "stage"), "leave --all out"),
        (("se_resnet8", "--per", "layer"), "layer"),
        (("se_resnet8", "--input-size", "0"), "--input-size 0"),
        (("inception_v3", "--input-size", "40"), "at least 75"),
        (("se_resnet8", "-o", "cost.csv"), "--format csv"),
        (("missing.safetensors",), "no such weight file"),
    ],
)
def test_mistakes_get_one_line(senet, words, message):
    code, out, err = senet("cost", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
