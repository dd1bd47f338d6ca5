import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers.messages import assert_said
from senet import Excitations, create_model, save_weights
from senet.cli.main import app
from senet.data.viewing import Viewing
from senet.inspection import command as gate_report
from senet.inspection import report
from senet.weights.load import load_weights


@pytest.fixture
def weights(trained):
    return trained / "best.safetensors"


def page_data(folder):
    text = (folder / "index.html").read_text()
    return json.loads(re.search(r'id="report-data">(.*?)</script>', text, re.S).group(1))


def test_help():
    result = CliRunner().invoke(app, ["inspect", "--help"])
    assert result.exit_code == 0
    assert "--checkpoint" in result.output


def test_classes_and_files_whose_names_are_no_utf_8(senet, photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "cold").rename(data / os.fsdecode(b"fr\xe9d"))
    (data / "warm" / "0.png").rename(data / "warm" / os.fsdecode(b"\xe9\x1b[31m.png"))
    run, out = tmp_path / "run", tmp_path / "report"
    assert senet("train", "--data", data, "--model", "se_resnet8", "--epochs", 1, "-o", run)[0] == 0
    weights = run / "best.safetensors"
    assert load_weights(weights)[1]["classes"] == ["fr\udce9d", "warm"]
    assert senet("inspect", "--checkpoint", weights, "--data", data, "--output", out)[0] == 0
    assert Excitations.load(out / "excitations.npz").classes == ("fr\udce9d", "warm")
    for name in ("index.html", "findings.csv"):
        (out / name).read_text(encoding="utf-8")


def test_the_report_of_a_run(senet, photos, weights, tmp_path):
    out = tmp_path / "deep" / "report"
    code, text, err = senet("inspect", "--checkpoint", weights, "--data", photos, "--output", out)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted(report.FILES)
    assert "Gates of se_resnet8" in text
    assert "layer2.0.se" in text
    assert "input-independent: variation ≤ 0.05" in " ".join(text.split())
    assert "validation images" in text
    rows = list(csv.DictReader(io.StringIO((out / "findings.csv").read_text())))
    assert [row["site"] for row in rows] == ["layer1.0.se", "layer2.0.se", "layer3.0.se"]
    found = Excitations.load(out / "excitations.npz")
    assert found.images == 4  # the run's own validation images: 2 of each class
    assert found.classes == ("cold", "warm")
    data = page_data(out)
    assert data["about"]["model"] == "se_resnet8"
    assert len(data["pictures"]) == 4

    code, _, err = senet("inspect", "--checkpoint", weights, "--data", photos, "--output", out)
    assert code == 2
    assert_said(err, "exists … --output … --overwrite")
    (out / "mine.txt").write_text("kept")
    words = ("--overwrite", "--sites", "layer3*", "--classes", "warm", "--threshold", "dead=0.2", "--top", 2)
    code, text, err = senet("inspect", "--checkpoint", weights, "--data", photos / "warm" / "..", "-o", out, *words)
    assert (code, err) == (0, "")
    assert_said(text, "dead … ≤ 0.2")
    assert list(Excitations.load(out / "excitations.npz").sites) == ["layer3.0.se"]
    assert (out / "mine.txt").read_text() == "kept"
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_a_network_of_the_zoo_with_weights_from_a_file(senet, photos, tmp_path):
    network = create_model("se_resnet8", 5)
    save_weights(tmp_path / "weights.safetensors", network)
    words = ("--model", "se_resnet8", "--pretrained", tmp_path / "weights.safetensors", "--size", 16)
    code, _, err = senet("inspect", *words, "--data", photos, "-o", tmp_path / "report")
    assert (code, err) == (0, "")
    found = Excitations.load(tmp_path / "report" / "excitations.npz")
    assert found.images == 24
    assert found["layer1.0.se"].count.tolist() == [12, 12, 0]
    values = []
    handle = network.layer1[0].se.register_forward_hook(lambda m, a, o: values.append(m.gate(a[0])))
    images = torch.from_numpy(np.stack([_sixteen(photos / "cold" / f"{n}.png") for n in range(12)]))
    with torch.no_grad():
        network.eval()(images)
    handle.remove()
    np.testing.assert_allclose(found["layer1.0.se"].class_mean()[0], values[0].mean(0), atol=1e-5)


def _sixteen(path):
    """An image as ImageNet networks get it: the centre 16 pixels at 256/224 of that size, normalised."""
    from PIL import Image
    from torchvision.transforms import v2

    steps = (v2.PILToTensor(), v2.Resize(18, antialias=True), v2.CenterCrop(16), v2.ToDtype(torch.float32, scale=True))
    image = v2.Compose([*steps, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(Image.open(path))
    return image.numpy()


def test_weights_of_a_run_get_images_as_the_run_did(senet, photos, weights, tmp_path):
    shutil.copytree(photos, tmp_path / "all")
    for path in list((tmp_path / "all").rglob("*.png")):
        path.rename(path.with_stem(f"other{path.stem}"))  # all are taken, of what the run was trained on only some
    words = ("--data", tmp_path / "all", "-o")
    assert senet("inspect", "--checkpoint", weights, *words, tmp_path / "a")[0] == 0
    assert senet("inspect", "--model", "se_resnet8", "--pretrained", weights, *words, tmp_path / "b")[0] == 0
    first, second = (Excitations.load(tmp_path / name / "excitations.npz") for name in "ab")
    assert first.images == second.images == 24
    for one, two in zip(first, second, strict=True):
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-6)


def test_known_weights_get_images_as_they_were_trained_on(monkeypatch, photos):
    monkeypatch.setattr("senet.weights.create.load_pretrained", lambda model, source: None)  # no network here
    spec = gate_report.open_model("se_resnet50", "default", str(photos)).spec
    assert (spec.size, spec.resize, spec.interpolation) == (224, 256, "bicubic")  # timm's seresnet50.ra2_in1k
    spec = gate_report.open_model("timm:tf_mobilenetv3_small_100", None, str(photos), Viewing(size=112)).spec
    assert (spec.size, spec.resize, spec.mean, spec.interpolation) == (112, 128, (0.5, 0.5, 0.5), "bilinear")
    spec = gate_report.open_model("torchvision:mobilenet_v3_small", None, str(photos), Viewing(size=64)).spec
    assert (spec.size, spec.interpolation) == (64, "bilinear")


def test_the_folder_itself_is_enough_to_write_in(tmp_path):
    (tmp_path / "report").mkdir()
    with gate_report.all_or_nothing(tmp_path / "report") as place:  # it may be another disk than what is around it
        assert place.parent == tmp_path / "report"
        (place / "a").write_text("x")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [tmp_path / "report"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--checkpoint FILE … --model NAME"),
        (("--model", "se_resnet8", "--checkpoint", "x"), "--checkpoint FILE … --model NAME"),
        (("--checkpoint", "nothing.safetensors"), "nothing.safetensors … no such weight file"),
        (
            ("--checkpoint", "WEIGHTS", "--classes", "warm,hot"),
            "'hot' … no images … cold",
        ),
        (("--checkpoint", "WEIGHTS", "--threshold", "alive=1"), "alive … dead, saturated"),
        (("--checkpoint", "WEIGHTS", "--threshold", "dead=7"), "7 … between 0 and 1"),
        (("--checkpoint", "WEIGHTS", "--sites", "layer9*"), "no SE gate of"),
        (("--checkpoint", "WEIGHTS", "--top", "-1"), "top=-1"),
        (("--model", "resnet8"), "no SE gates"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(senet, photos, weights, tmp_path, words, message):
    words = [weights if word == "WEIGHTS" else word for word in words]
    code, out, err = senet("inspect", *words, "--data", photos, "-o", tmp_path / "report")
    assert (code, out) == (2, "")
    assert_said(err, message)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def network_with_a_gate_of_nan():
    """All of its weights are finite: the hidden layer overflows, and infinity times 0 is NaN."""
    network = create_model("se_resnet8", 3)
    block = network.layer2[0]
    with torch.no_grad():
        block.bn2.bias.fill_(100)
        block.se.fc1.weight.fill_(3e38)
        block.se.fc2.weight.zero_()
    return network


def test_nan_in_the_weights_is_named(senet, photos, tmp_path):
    network = create_model("se_resnet8", 2)
    network.layer2[0].se.fc2.weight.data[:] = torch.nan
    save_weights(tmp_path / "nan.safetensors", network)
    words = ("--model", "se_resnet8", "--pretrained", tmp_path / "nan.safetensors", "--size", 16)
    code, _, err = senet("inspect", *words, "--data", photos, "-o", tmp_path / "report")
    assert code == 2
    assert_said(err, "'layer2.0.se.fc2.weight' … 64 of 64 … NaN")
    network = network_with_a_gate_of_nan()
    save_weights(tmp_path / "nan.safetensors", network)
    code, _, err = senet("inspect", *words, "--data", photos, "-o", tmp_path / "report")
    assert code == 2
    assert "gate 'layer2.0.se' gives NaN" in err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_stop_leaves_no_half_report(senet, photos, weights, tmp_path, monkeypatch, there):
    out = tmp_path / "report"
    words = ("inspect", "--checkpoint", weights, "--data", photos, "-o", out, "--overwrite")
    if there:
        assert senet(*words)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else {}

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "finding_rows", stop)  # when the page and the figures are written already
    assert senet(*words)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == (["report"] if there else [])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before if there else not out.exists()


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(senet, photos, weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    words = ("inspect", "--checkpoint", weights, "--data", photos, "--output")
    monkeypatch.setattr(gate_report, "record_excitations", None)  # it does not come to that
    code, _, err = senet(*words, tmp_path / "file" / "deep" / "report")
    assert code == 2
    assert_said(err, "file is a file … --output")
    may = gate_report.os.access  # tests may run as root, who may do everything
    monkeypatch.setattr(
        gate_report.os, "access", lambda path, *mode, **how: path != tmp_path and may(path, *mode, **how)
    )
    code, _, err = senet(*words, tmp_path / "report")
    assert code == 2
    assert_said(err, f"{tmp_path} … cannot be written … --output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
