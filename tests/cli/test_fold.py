import csv
import io
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.messages import assert_said
from senet import build_from_checkpoint, find_gates, record_excitations, save_weights
from senet.cli.main import app
from senet.folding import command as folding


@pytest.fixture
def weights(trained):
    return trained / "best.safetensors"


def test_help():
    result = CliRunner().invoke(app, ["fold", "--help"])
    assert result.exit_code == 0
    assert "--max-drop" in result.output


def test_a_search_its_files_and_the_folded_network(senet, photos, weights, tmp_path):
    out = tmp_path / "deep" / "folded"
    words = ("--checkpoint", weights, "--data", photos, "--output", out)
    code, text, err = senet("fold", *words, "--max-drop", 100, "--rounds", 2)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted(folding.FILES)
    assert_said(text, "gates of se_resnet8")
    assert_said(text, "3 of 3 gates … CifarResNet … folded")
    assert_said(text, "one image … 25 points")
    assert all(len(line) <= 80 for line in text.splitlines()[:7])

    rows = list(csv.DictReader(io.StringIO((out / "fold.csv").read_text())))
    assert [row["kept"] for row in rows] == ["True"] * 4
    assert {row["gate"] for row in rows} == {"", "layer1.0.se", "layer2.0.se", "layer3.0.se"}
    variations = [float(row["variation"]) for row in rows[1:]]
    assert variations == sorted(variations)
    assert all(float(row["time_q25"]) <= float(row["time"]) <= float(row["time_q75"]) for row in rows)
    parameters = [int(row["parameters"]) for row in rows]
    assert parameters == sorted(parameters, reverse=True)
    content = json.loads((out / "fold.json").read_text())
    assert content["max_drop"] == 100
    assert content["about"]["gates"].startswith("means over 20 images")  # those that the run trained on
    assert [site["fate"] for site in content["sites"]] == ["folded"] * 3
    with Image.open(out / "tradeoff.png") as picture:
        assert min(picture.size) > 500

    network, metadata = build_from_checkpoint(out / "folded.safetensors")
    assert find_gates(network) == []
    assert metadata["folded"] == dict.fromkeys(("layer1.0.se", "layer2.0.se", "layer3.0.se"), 0)
    assert sum(p.numel() for p in network.parameters()) == parameters[-1]
    code, text, err = senet("eval", "--checkpoint", out / "folded.safetensors", "--data", photos, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["images"] == 4  # of the images that it was trained on, still those held out
    code, text, err = senet("predict", "--checkpoint", out / "folded.safetensors", photos / "warm" / "0.png")
    assert (code, err) == (0, "")
    code, _, err = senet("fold", "-c", out / "folded.safetensors", "--data", photos, "-o", tmp_path / "again")
    assert code == 2
    assert "has no SE gates" in err
    assert not (tmp_path / "again").exists()

    code, _, err = senet("fold", *words)
    assert code == 2
    assert_said(err, "exists … --output … --overwrite")
    code, text, err = senet("fold", *words, "--overwrite", "--stage", 4, "--rounds", 0)
    assert (code, err) == (0, "")
    assert_said(text, "1 of 3 gates … folded … 2 kept")
    network, metadata = build_from_checkpoint(out / "folded.safetensors")
    assert [gate.name for gate in find_gates(network)] == ["layer1.0.se", "layer2.0.se"]


def test_the_folded_network_is_the_one_whose_gates_are_constant(senet, photos, weights, tmp_path):
    x = torch.randn(4, 3, 12, 12)
    network, _ = build_from_checkpoint(weights)
    found = record_excitations(network, [x])
    found.save(tmp_path / "gates.npz")
    words = (
        "--checkpoint",
        weights,
        "--data",
        photos,
        "--excitations",
        tmp_path / "gates.npz",
        "--sites",
        "layer[13]*",
    )
    code, _, err = senet("fold", *words, "--output", tmp_path / "folded", "--rounds", 0)
    assert (code, err) == (0, "")
    for name in ("layer1.0.se", "layer3.0.se"):
        mean = torch.from_numpy(found[name].overall()[0]).float()[:, None, None]
        network.get_submodule(name).register_forward_hook(lambda module, args, output, mean=mean: args[0] * mean)
    folded, _ = build_from_checkpoint(tmp_path / "folded" / "folded.safetensors")
    with torch.no_grad():
        wanted = network(x)
        assert (folded(x) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_budget_that_allows_nothing_leaves_the_network(senet, photos, weights, tmp_path, monkeypatch):
    accuracies = iter([90.0, 80.0, 70.0, 60.0])
    monkeypatch.setattr(folding, "accuracy_of", lambda *what: lambda network: next(accuracies))
    words = ("--checkpoint", weights, "--data", photos, "--output", tmp_path / "folded", "--rounds", 0)
    code, text, err = senet("fold", *words)  # --max-drop is 0.1
    assert (code, err) == (0, "")
    assert text.count("not kept") == 3
    assert_said(text, "0 of 3 gates … folded … 3 kept")
    network, metadata = build_from_checkpoint(tmp_path / "folded" / "folded.safetensors")
    assert len(find_gates(network)) == 3
    assert "folded" not in metadata or not metadata["folded"]


def test_ctrl_c_leaves_nothing_behind(senet, photos, weights, tmp_path, monkeypatch):
    def stopped(network):
        raise KeyboardInterrupt

    monkeypatch.setattr(folding, "accuracy_of", lambda *what: stopped)
    code, _, _ = senet("fold", "-c", weights, "--data", photos, "-o", tmp_path / "folded")
    assert code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sites", "layer9*"), "'layer9*' … 3 gates … 'layer1.0.se'"),
        (("--stage", 5), "stage 5 … 2, 3, 4"),
        (("--max-drop", -1), "-1 … at least 0"),
        (("--record-images", 1), "1 … at least 2"),
        (("--excitations", "nowhere.npz"), "nowhere.npz … no such file"),
        (("--checkpoint", "nowhere.safetensors"), "nowhere.safetensors … no such weight file"),
        (("--data", "nowhere"), "no folder … no dataset … 'nowhere'"),
        (("--device", "cuda"), "no cuda device"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(senet, photos, weights, tmp_path, words, message):
    if words == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    given = {"--checkpoint": weights, "--data": photos} | {words[0]: words[1]}
    arguments = [each for pair in given.items() for each in pair]
    code, _, err = senet("fold", *arguments, "-o", tmp_path / "folded")
    assert code == 2
    assert_said(err, message)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_excitations_of_another_network_and_a_closed_file(senet, photos, weights, trained, tmp_path):
    other, metadata = build_from_checkpoint(weights)
    found = record_excitations(other, [torch.randn(2, 3, 12, 12)])
    found.sites["layer9.0.se"] = found.sites.pop("layer1.0.se")
    found.sites["layer9.0.se"].name = "layer9.0.se"
    found.save(tmp_path / "gates.npz")
    words = ("--checkpoint", weights, "--data", photos, "-o", tmp_path / "folded")
    code, _, err = senet("fold", *words, "--excitations", tmp_path / "gates.npz")
    assert code == 2
    assert_said(err, "excitations … another network … 'layer9.0.se'")
    (tmp_path / "gates.npz").write_bytes((tmp_path / "gates.npz").read_bytes()[:-40])
    code, _, err = senet("fold", *words, "--excitations", tmp_path / "gates.npz")
    assert code == 2
    assert_said(err, "gates.npz … not a readable file")
    for parameter in other.layer2.parameters():
        parameter.data.fill_(float("nan"))
    save_weights(tmp_path / "nan.safetensors", other, metadata)
    code, _, err = senet("fold", "-c", tmp_path / "nan.safetensors", "--data", photos, "-o", tmp_path / "folded")
    assert code == 2
    assert "NaN or infinity" in err
    assert not (tmp_path / "folded").exists()


@pytest.mark.slow
def test_digits_lose_gates_and_no_accuracy_to_speak_of(senet, tmp_path):
    """The whole command on real images: half of the gates go, for at most one point."""
    run = tmp_path / "run"
    assert senet("train", "--data", "digits", "--model", "se_resnet8", "--epochs", 8, "-o", run)[0] == 0
    code, _, _ = senet(
        "fold", "-c", run / "best.safetensors", "--data", "digits", "--max-drop", 1, "-o", tmp_path / "out"
    )
    assert code == 0
    content = json.loads((tmp_path / "out" / "fold.json").read_text())
    assert sum(site["fate"] == "folded" for site in content["sites"]) >= 2
    final = [step for step in content["steps"] if step["kept"]][-1]
    assert final["drop"] <= 1
    code, text, _ = senet("eval", "-c", tmp_path / "out" / "folded.safetensors", "--data", "digits", "--json")
    assert json.loads(text)["top1_error"] == pytest.approx(100 - final["accuracy"], abs=0.3)  # of 359 images, one
