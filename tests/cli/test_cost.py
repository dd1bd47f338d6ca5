"""`senet cost`: what it prints and writes, and how it refuses."""

import csv
import functools
import io
import json
from dataclasses import replace

import pytest

from helpers.messages import assert_said
from senet import SEConfig, attach, create_model, save, save_weights
from senet.cli import cost_tables
from senet.cost import paper as costs
from senet.cost.count import model_cost


def test_a_network_beside_its_twin_in_every_form(senet, tmp_path):
    code, out, err = senet("cost", "resnet8")
    assert (code, err) == (0, "")
    for words in ("se_resnet8 and its plain twin", "32×32", "SE adds", "with running statistics", "saved for backward"):
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
    assert "does not say which network" in senet("cost", file)[2]


def counted(senet, model, path):
    """Both sides of what `senet cost` says of a saved network."""
    rows = json.loads(senet("cost", save(model, path), "--format", "json")[1])
    return [(row["model"], row["params"]) for row in rows]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_weight_file_is_counted_with_its_own_gates(senet, tmp_path):
    """Attached, folded, put in or left out by an argument: never those of the name."""
    path, plain = tmp_path / "é w.safetensors", create_model("resnet8", 10)
    model = create_model("resnet8", 10)
    attach(model, SEConfig(4))
    assert counted(senet, model, path) == [("resnet8", size(plain)), ("resnet8+se", size(model))]
    assert_said(senet("cost", path)[1], "resnet8+se … plain twin")
    rows = json.loads(senet("cost", path, "--per", "stage", "--format", "json")[1])
    assert sum(row["params"] for row in rows) == size(model)
    config = create_model("se_resnet8", 10).network_config
    model = replace(config, folded={"layer1.0.se": 0, "layer2.0.se": 32}).create()
    assert counted(senet, model, path) == [("resnet8", size(plain)), ("se_resnet8", size(model))]
    model = create_model("resnet8", 10, se=SEConfig(4))
    assert counted(senet, model, path) == [("resnet8", size(plain)), ("se_resnet8", size(model))]
    model = create_model("se_resnet8", 10, se=None)
    twin = size(create_model("se_resnet8", 10))
    assert counted(senet, model, path) == [("resnet8", size(model)), ("se_resnet8", twin)]


def test_damaged_weight_files_and_a_folder_for_the_output(senet, tmp_path):
    path = tmp_path / "w.safetensors"
    for metadata in ({"se": 5}, {"kwargs": 5}, {"model": 5}):
        save_weights(path, create_model("resnet8", 5), {"model": "resnet8", **metadata})
        for more in ((), ("--vs-paper",)):
            code, _, err = senet("cost", path, *more)
            assert (code, err.count("\n")) == (2, 1)
            assert "its metadata are damaged" in err
    words = ("cost", "resnet8", "--format", "csv", "--overwrite", "-o", tmp_path)
    assert senet(*words) == (2, "", f"error: {tmp_path} is a folder; give a file as --output\n")


def test_the_papers_figures_beside_ours(senet):
    code, out, err = senet("cost", "se_shufflenet_v1_g3", "--vs-paper")
    assert (code, err) == (0, "")
    for words in ("Table 3", "SE-ShuffleNet", "142", "139.68", "(1)", "truncated"):
        assert words in out
    rows = json.loads(senet("cost", "senet154", "--vs-paper", "--format", "json")[1])
    (row,) = rows
    assert (row["printed"], row["agrees"], round(row["ours"])) == ("440", True, 440)


def test_everything_and_everything_published(senet, monkeypatch):
    small = [
        row for row in costs.ROWS if row.table == "Table 16" or row.name.endswith(("SENet-154", "Inception-ResNet-v2"))
    ]
    monkeypatch.setattr(costs, "compared", functools.partial(costs.compared, small))
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
        ((), "specify a network"),
        (("se_resnet8", "--all"), "specify a network"),
        (("se_resnet9",), "did you mean"),
        (("se_resnet9", "--vs-paper"), "did you mean"),
        (("resnet20", "--vs-paper"), "no cost … 'resnet20'"),
        (("se_resnet50", "--vs-paper", "--input-size", "64"), "omit --input-size"),
        (("--all", "--per", "stage"), "omit --all"),
        (("se_resnet8", "--per", "layer"), "layer"),
        (("se_resnet8", "--input-size", "0"), "--input-size 0"),
        (("inception_v3", "--input-size", "40"), "at least 75"),
        (("se_resnet8", "-o", "cost.csv"), "--format csv"),
        (("missing.safetensors",), "no such weight file"),
        (("torchvision:resnet18",), "module_costs counts any other"),
        (("resnet8+se",), "module_costs counts any other"),
    ],
)
def test_mistakes_get_one_line(senet, words, message):
    code, out, err = senet("cost", *words)
    assert (code, out) == (2, "")
    assert_said(err, message)
    assert err.count("\n") == 1
