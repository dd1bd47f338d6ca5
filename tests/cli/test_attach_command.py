"""``senet attach``."""

import json

import pytest
import torch

from helpers.messages import assert_said
from senet import build_from_checkpoint, from_pretrained
from senet.nn.attachment import attached


def test_a_table_of_sites(senet):
    code, out, err = senet("attach", "torchvision:resnet18", "--size", 64)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "SE in torchvision:resnet18"
    assert lines[4].split() == ["layer1.0.bn2", "residual", "2", "64", "16×16", "580", "512"]
    assert_said(out, "8 … ResNet … 89,080 … +0.76 %")


def test_policies_and_json(senet):
    code, out, _ = senet("attach", "timm:resnet18", "--sites", "late", "--se", "reduction=8", "--format", "json")
    assert code == 0
    report = json.loads(out)
    assert [site["name"] for site in report["sites"]] == [f"layer{s}.{b}.bn2" for s in (3, 4) for b in (0, 1)]
    assert report["config"]["reduction"] == 8
    assert report["config"]["identity_init"] is True
    assert report["added_parameters"] == sum(site["parameters"] for site in report["sites"])
    code, out, _ = senet("attach", "resnet20", "--max-parameters", 100, "--size", 32)
    assert code == 0
    assert_said(out, "2 SE blocks")
    for sites, count in (
        ("layer1.0.bn2,layer3.2.bn2", "2 SE blocks"),
        ("conv1", "1 SE block"),
        ("bn1:input", "1 SE block"),
    ):
        code, out, _ = senet("attach", "resnet20", "--sites", sites)
        assert code == 0
        assert_said(out, f"{count} ")


def test_the_network_is_saved_and_loads(senet, tmp_path):
    target = tmp_path / "a.safetensors"
    words = ("attach", "torchvision:squeezenet1_1", "--num-classes", 3, "--output", target)
    code, out, _ = senet(*words)
    assert code == 0
    assert out.endswith(f"written: {target}\n")
    model, metadata = build_from_checkpoint(target)
    assert len(attached(model)) == 8
    assert metadata["num_classes"] == 3
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), from_pretrained(target)(x))
    code, _, err = senet(*words)
    assert code == 2
    assert_said(err, "exists … --output … --overwrite")
    assert senet(*words, "--overwrite")[0] == 0
    target.unlink()
    target.mkdir()
    assert_said(senet(*words, "--overwrite")[2], f"{target} … folder … --output")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resnet9",), "no model 'resnet9'"),
        (("torchvision:resnet9",), "torchvision … 'resnet9' … torchvision:resnet"),
        (("timm:resnet9",), "timm … 'resnet9' … timm:resnet"),
        (("keras:resnet50",), "torchvision:NAME … timm:NAME"),
        (("se_resnet8",), "3 places … layer1.0.se … has SE"),
        (("resnet8", "--sites", "lat"), "'lat' … 'late'"),
        (("resnet8", "--sites", "stem"), "no module 'stem'"),
        (("resnet8", "--sites", ""), "sites=''"),
        (("resnet8", "--sites", "layer1.0.bn3"), "'layer1.0.bn3' … 'layer1.0.bn2'"),
        (("resnet8", "--sites", "layer1.0.bn2,conv1", "--min-channels", "8"), "omit --min-channels"),
        (("resnet8", "--min-channels", "0"), "min_channels=0"),
        (("resnet8", "--se", "gate=soft"), "gate='soft'"),
        (("resnet8", "--size", "0"), "--size 0"),
        (("resnet8", "-o", "a.pt"), "a.pt … .safetensors"),
        (("resnet8", "--pretrained", "none.pt"), "none.pt"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(senet, words, message):
    code, out, err = senet("attach", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert_said(err, message)


def test_train_and_eval_with_attached_gates(senet, photos, tmp_path):
    words = ("--data", photos, "--epochs", 1, "--set", "batch_size=8", "--attach")
    code, out, err = senet("train", *words, "--model", "resnet8", "-o", tmp_path / "run", "--se", "reduction=4")
    assert code == 0, err
    assert "resnet8+se: validation error" in out
    weights = tmp_path / "run" / "best.safetensors"
    assert len(attached(build_from_checkpoint(weights)[0])) == 3
    assert senet("eval", "--checkpoint", weights, "--data", photos)[0] == 0
    # A network that has learned goes on, with gates that may learn faster.
    code, _, err = senet("train", *words, "--model", "resnet8", "-o", tmp_path / "plain", "--sites", "late")
    assert code == 0, err
    assert "attached_lr: 1.0" in (tmp_path / "plain" / "recipe.yaml").read_text()
    for wrong, message in (
        (("--model", "se_resnet8"), "'se_resnet8' already has SE"),
        (("--model", "timm:no"), "timm … 'no'"),
        (("--model", "resnet8", "--sites", "layer9.bn"), "no module 'layer9.bn'"),
    ):
        code, _, err = senet("train", *words, *wrong, "-o", tmp_path / "x")
        assert code == 2
        assert_said(err, message)
        assert not (tmp_path / "x").exists()


def test_fine_tuning_a_plain_network(senet, photos, tmp_path):
    words = ("--data", photos, "--epochs", 1, "--set", "batch_size=8", "--model", "resnet8")
    assert senet("train", *words, "-o", tmp_path / "plain")[0] == 0
    weights = tmp_path / "plain" / "best.safetensors"
    code, _, err = senet("train", *words, "-o", tmp_path / "tuned", "--attach", "--pretrained", weights)
    assert code == 0, err
    assert "attached_lr: 10.0" in (tmp_path / "tuned" / "recipe.yaml").read_text()
