"""Saved networks come back as they were, with a card that is right; what cannot come back is refused."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torchvision
import yaml

import senet
from helpers.images import images
from helpers.messages import one_line
from helpers.networks import with_statistics_of
from senet import SEConfig
from senet.data.transforms import TransformSpec
from senet.models.registry import NetworkConfig

VARIANTS = [
    (
        "se_resnet8",
        {"num_classes": 7, "in_chans": 1, "se": SEConfig(4, gate="hard_sigmoid", stages=(2, 4)), "drop_rate": 0.2},
    ),
    ("se_resnet8", {"features_only": True}),
    ("se_resnet20", {"num_classes": 0}),
    ("resnet8", {"num_classes": 3}),
]
METADATA = {
    "classes": ["ant", "bee", "wasp"],
    "transform": TransformSpec(24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3)).to_dict(),
    "metrics": {"val_error": 0.125, "val_top5_error": None},
    "dataset": "somebody/insects",
    "license": "cc-by-4.0",
}


def outputs(model, in_chans=3):
    with torch.no_grad():
        out = model(torch.randn(2, in_chans, 16, 16, generator=torch.Generator().manual_seed(1)))
    return out if isinstance(out, list) else [out]


def same(one, other, in_chans=3):
    pairs = list(zip(outputs(one, in_chans), outputs(other, in_chans), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def settled(name, **kwargs):
    """A network whose statistics are not those of a new one."""
    x = images(16, batch=4, channels=kwargs.get("in_chans", 3), dtype=torch.float32)
    return with_statistics_of(senet.create_model(name, **kwargs), x)


@pytest.mark.parametrize("kind", ["folder", "file.safetensors"])
@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_round_trip(name, kwargs, kind, tmp_path):
    model = settled(name, **kwargs)
    path = senet.save(model, tmp_path / "deep" / kind)
    again = senet.from_pretrained(path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert same(model, again, kwargs.get("in_chans", 3))
    assert not again.training
    assert again.network_config.se == model.network_config.se
    assert again.network_config.kwargs == model.network_config.kwargs
    assert senet.from_pretrained(senet.save(again, tmp_path / "second")).network_config == again.network_config


def test_saving_neither_draws_from_the_generator_nor_touches_the_network(tmp_path):
    model = settled("se_resnet8", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(4)
    senet.save(model, tmp_path / "folder")
    drawn = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_remembers_through_copies_pickles_and_a_new_head(tmp_path):
    model = settled("se_resnet8", num_classes=3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.network_config == NetworkConfig("se_resnet8", 3, 3, SEConfig())
        assert same(model, senet.from_pretrained(senet.save(twin, tmp_path / "twin.safetensors")))
    model.reset_classifier(11)
    assert same(model, senet.from_pretrained(senet.save(model, tmp_path / "eleven")))


def test_accelerated_and_compiled_networks_are_saved_as_the_ordinary_one(tmp_path):
    model = settled("se_resnet8", num_classes=3)
    for index, form in enumerate((senet.accelerate(model), torch.compile(model))):
        again = senet.from_pretrained(senet.save(form, tmp_path / str(index)))
        assert type(again) is type(model)
        assert same(model, again)


def test_attached_gates_come_back_and_timm_is_not_promised_them(tmp_path):
    model = senet.create_model("resnet8", 3)
    senet.attach(model, SEConfig(4, identity_init=True))
    gates = [module for module in model.modules() if isinstance(module, senet.SqueezeExcite)]
    for gate in gates:
        torch.nn.init.normal_(gate.fc2.weight)
    path = senet.save(model.eval(), tmp_path / "attached")
    assert same(model, senet.from_pretrained(path))
    card = (path / "README.md").read_text()
    assert f"attached SE | {len(gates)} blocks, reduction 4" in card
    assert "timm" not in card
    assert "architecture" not in json.loads((path / "config.json").read_text())


def test_changes_replace_the_head_or_leave_a_backbone(tmp_path, caplog):
    model = settled("se_resnet8", num_classes=3)
    path = senet.save(model, tmp_path / "three")
    five = senet.from_pretrained(path, num_classes=5, drop_rate=0.5)
    assert "fc.weight" in caplog.text
    assert outputs(five)[0].shape == (2, 5)
    assert five.dropout.p == 0.5
    trunk = senet.from_pretrained(path, features_only=True)
    with torch.no_grad():
        expected = model.forward_stages(torch.ones(1, 3, 16, 16))
        assert all(torch.equal(a, b) for a, b in zip(trunk(torch.ones(1, 3, 16, 16)), expected, strict=True))
    with pytest.raises(ValueError, match="does not take depth=3"):
        senet.from_pretrained(path, depth=3)
    with pytest.raises(senet.InputError, match=r"create_model takes pretrained="):
        senet.from_pretrained(path, pretrained="default")


def test_a_file_serves_the_commands_too(tmp_path):
    model = settled("se_resnet8", num_classes=3)
    path = senet.save(model, tmp_path / "f.safetensors", METADATA)
    again, metadata = senet.build_from_checkpoint(path)
    assert same(model, again)
    assert {key: metadata[key] for key in METADATA} == METADATA
    kept = senet.save(again, tmp_path / "folder", metadata)  # as one shares what `senet train` wrote
    assert "val_error | 0.125" in (kept / "README.md").read_text()


def replaced_layer(model):
    model.relu = torch.nn.GELU()
    return model


def other_gate_with_the_same_keys(model):
    gate = model.layer1[0].se
    model.layer1[0].se = senet.SqueezeExcite(gate.channels, SEConfig(gate="tanh"))
    return model


def other_shape(model):
    model.fc.weight = torch.nn.Parameter(torch.zeros(9, 64))
    return model


def gate_added(model):
    model.layer2[0].extra = senet.SqueezeExcite(32)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_layer, "relu is GELU"),
        (other_gate_with_the_same_keys, r"layer1.0.se is .*gate='tanh'.*gate='sigmoid'"),
        (other_shape, "fc.weight has a different shape"),
        (gate_added, "layer2.0.extra is SqueezeExcite.*but a new one has nothing"),
    ],
)
def test_what_could_not_be_made_again_is_refused(change, message, tmp_path):
    with pytest.raises(senet.InputError, match=f"{message}.*save_weights") as error:
        senet.save(change(senet.create_model("se_resnet8", 3)), tmp_path / "x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


def test_foreign_networks_paths_and_metadata_are_refused(tmp_path):
    model = senet.create_model("se_resnet8", 3)
    with pytest.raises(senet.InputError, match=one_line("ResNet … senet.create_model")):
        senet.save(torchvision.models.resnet18(), tmp_path / "x")
    with pytest.raises(senet.InputError, match=one_line(".safetensors … folder")):
        senet.save(model, tmp_path / "x.pth")
    with pytest.raises(senet.InputError, match=one_line("2 classes … 3")):
        senet.save(model, tmp_path / "x", {"classes": ["a", "b"]})
    with pytest.raises(senet.InputError, match="JSON"):
        senet.save(model, tmp_path / "x", {"seen": {1, 2}})
    for wrong, kind in (
        ({"classes": "abc"}, "list"),
        ({"classes": 3}, "list"),
        ({"metrics": [0.5]}, "dict"),
        ({"transform": 224}, "dict"),
        ({"dataset": ["a/b", "c/d"], "metrics": {"error": 0.5}}, "str"),
    ):
        with pytest.raises(senet.InputError, match=one_line(f"'{next(iter(wrong))}' … must be a {kind}")):
            senet.save(model, tmp_path / "x", wrong)
    with pytest.raises(senet.InputError, match="JSON"):
        senet.save(model, tmp_path / "x", ["ant", "bee", "wasp"])
    with pytest.raises(senet.InputError, match="nothing to save"):
        senet.save(copy.deepcopy(model).to("meta"), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_sources_that_hold_no_network_are_refused_in_one_line(tmp_path):
    senet.save_weights(tmp_path / "bare.safetensors", senet.create_model("resnet8"))
    with pytest.raises(senet.InputError, match=one_line("bare.safetensors: … which network")):
        senet.from_pretrained(tmp_path / "bare.safetensors")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    with pytest.raises(senet.InputError, match=one_line("timm: … which network")):
        senet.from_pretrained(tmp_path / "timm")
    for damaged in (b"{", b"\xff", b'{"senet": 3}', b'{"senet": {"model": "resnet8", "se": 5}}'):
        (tmp_path / "timm" / "config.json").write_bytes(damaged)
        with pytest.raises(senet.InputError, match="timm"):
            senet.from_pretrained(tmp_path / "timm")
    for missing in ("no/such/folder", "some where", tmp_path / "none.safetensors"):
        with pytest.raises(senet.InputError, match=r"there is no such") as error:
            senet.from_pretrained(missing, local_files_only=True)
        assert "\n" not in str(error.value)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_is_known_and_its_code_runs(tmp_path):
    config = SEConfig(8, squeeze="max", stages=(2, 3))
    model = settled("se_resnet8", num_classes=3, se=config)
    text = (senet.save(model, tmp_path / "insects", METADATA) / "README.md").read_text()
    head = front_matter(text)
    assert head["library_name"] == "senet"
    assert head["license"] == "cc-by-4.0"
    assert head["pipeline_tag"] == "image-classification"
    assert "squeeze-and-excitation" in head["tags"]
    result = head["model-index"][0]["results"][0]
    assert (head["model-index"][0]["name"], result["dataset"]["type"]) == ("se_resnet8", "somebody/insects")
    assert result["metrics"] == [{"type": "val_error", "value": 0.125}]
    resize = TransformSpec.from_dict(METADATA["transform"]).eval_resize
    for part in (
        "reduction 8, squeeze max, gate sigmoid, placement standard, stages 2, 3",
        "3 × 24 × 24",
        f"short side resized to {resize} pixels (bilinear)",
        "minus mean 0.4, 0.5, 0.6, divided by std 0.2, 0.2, 0.3",
        "ant, bee, wasp",
        "arXiv:1709.01507",
        f"{sum(p.numel() for p in model.parameters()):,}",
    ):
        assert part in text
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    space = {}
    exec(code.replace('"insects"', repr(str(tmp_path / "insects"))), space)
    assert space["output"].shape == (1, 3)


def test_the_card_claims_nothing_that_is_not_known(tmp_path):
    text = (senet.save(senet.create_model("resnet8", 0), tmp_path / "plain") / "README.md").read_text()
    head = front_matter(text)
    assert head.keys() == {"library_name", "model_name", "pipeline_tag", "tags"}
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert "The plain twin" in text
    assert "not stated" in text
    for word in ("Metrics", "preprocessing", "## Classes", "trained on", "reduction", "None"):
        assert word not in text


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = senet.create_model("resnet8", 2)
    (tmp_path / "README.md").write_text("mine")
    senet.save(model, tmp_path)
    model.reset_classifier(4)
    senet.save(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert senet.from_pretrained(tmp_path).num_classes == 4


def test_networks_and_single_files_need_no_huggingface_hub(tmp_path):
    script = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import senet\nmodel = senet.create_model('se_resnet8', 2)\n"
        "print(senet.from_pretrained(senet.save(model, 'w.safetensors')).num_classes)\n"
        "try: senet.save(model, 'folder')\nexcept senet.InputError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "2"
    assert "pip install huggingface_hub" in lines[1]
