import json
import stat

import pytest
import safetensors.torch
import torch

import senet
from helpers.messages import assert_said, one_line
from helpers.networks import own_registry
from senet import SEConfig
from senet.models import registry
from senet.system.atomic import write_atomically


def test_lists_pairs_and_patterns():
    names = senet.list_models()
    assert len(names) == len(set(names))
    assert {"resnet50", "se_resnet50", "resnet50_v1", "senet154", "wrn16_8", "preresnet164"} <= set(names)
    assert set(senet.list_models("se_resnet1*")) >= {"se_resnet18", "se_resnet101", "se_resnet110"}
    for name in names:
        spec = senet.model_spec(name)
        twin = senet.model_spec(spec.twin)
        assert twin.twin == name
        assert (spec.se is None) != (twin.se is None)
        assert twin.build is spec.build


@pytest.mark.parametrize(
    ("wrong", "right"), [("se_resnet5", "se_resnet50"), ("seresnet50", "se_resnet50"), ("resnext50", "resnext50_32x4d")]
)
def test_unknown_names_suggest_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"no model '{wrong}'.*'{right}'"):
        senet.create_model(wrong)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"drop_rate": 1.0}, "drop_rate=1.0"),
        ({"depth": 50}, "does not take depth=50"),
        ({"drop_rate": "much"}, "drop_rate"),
        ({"se": 16}, "se=16"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        senet.create_model("resnet8", **kwargs)


def test_register_model_makes_both_and_refuses_a_taken_name(monkeypatch):
    own_registry(monkeypatch)
    seen = []

    def build(num_classes, in_chans, se):
        seen.append(se)
        return torch.nn.Conv2d(in_chans, num_classes, 1)

    senet.register_model("mine", build, se=SEConfig(reduction=4))
    senet.create_model("mine", 2)
    senet.create_model("se_mine", 2)
    assert seen == [None, SEConfig(reduction=4)]
    with pytest.raises(ValueError, match="'resnet50' is already registered"):
        senet.register_model("resnet50", build)


def test_a_mistake_inside_a_builder_is_not_blamed_on_the_caller(monkeypatch):
    monkeypatch.setattr(registry, "_SPECS", dict(registry._specs()))

    def build(num_classes, in_chans, se):
        return torch.nn.Conv2d(in_chans, num_classes, kernel=1)

    senet.register_model("wrong", build)
    with pytest.raises(TypeError, match="kernel"):
        senet.create_model("wrong", 2)


def test_round_trip_with_metadata(tmp_path):
    config = SEConfig(reduction=4, gate="hard_sigmoid")
    model = senet.create_model("resnet8", 7, 1, se=config).eval()
    meta = {"model": "resnet8", "num_classes": 7, "in_chans": 1, "se": config.to_dict(), "classes": list("abcdefg")}
    senet.save_weights(tmp_path / "deep" / "w.safetensors", model, meta)
    rebuilt, metadata = senet.build_from_checkpoint(tmp_path / "deep" / "w.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(rebuilt(x), model(x))
    assert not rebuilt.training
    assert metadata["classes"] == list("abcdefg")
    assert metadata["senet_version"] == senet.__version__
    plain_reader = safetensors.torch.load_file(tmp_path / "deep" / "w.safetensors")
    assert plain_reader.keys() == model.state_dict().keys()


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="no such weight file"):
        senet.load_weights(tmp_path / "none.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"short\.safetensors: not a readable"):
        senet.load_weights(tmp_path / "short.safetensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.pth"):
        senet.load_weights(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        senet.load_weights(tmp_path / "list.pth")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=one_line("which network")):
        senet.build_from_checkpoint(tmp_path / "foreign.safetensors")
    metadata = {"senet": json.dumps({"model": "resnet8"})}
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "wrong.safetensors", metadata)
    with pytest.raises(ValueError, match="do not match 'resnet8'"):
        senet.build_from_checkpoint(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    ("name", "anew"),
    [
        ("se_resnet8", ["fc.weight", "fc.bias"]),
        ("vgg16_bn", ["classifier.6.weight", "classifier.6.bias"]),  # its two hidden layers are kept
        ("mobilenet_v1", ["classifier.weight", "classifier.bias"]),
    ],
)
def test_pretrained_replaces_the_head_for_another_class_count(tmp_path, caplog, name, anew):
    with torch.device("meta"):
        shapes = senet.create_model(name, 10).bfloat16().state_dict()
    # A number a tensor, in half precision: random ones of VGG's size take seconds.
    theirs = {key: torch.full_like(x, number, device="cpu") for number, (key, x) in enumerate(shapes.items())}
    torch.save(theirs, tmp_path / "w.pth")
    model = senet.create_model(name, 3, pretrained=tmp_path / "w.pth")
    assert_said(caplog.text, f"number of classes … {', '.join(anew)} ")
    own = model.state_dict()
    assert len(own[anew[0]]) == 3
    assert [key for key in own if key not in anew and not torch.equal(own[key], theirs[key].to(own[key]))] == []


@pytest.mark.parametrize("form", [{"num_classes": 0}, {"features_only": True}])
@pytest.mark.parametrize("name", ["se_resnet8", pytest.param("vgg16_bn", marks=pytest.mark.slow), "mobilenet_v1"])
def test_a_classifiers_weights_load_into_a_backbone(tmp_path, name, form):
    source = senet.create_model(name, 10).eval()
    senet.save_weights(tmp_path / "w.safetensors", source)
    trunk = senet.create_model(name, pretrained=tmp_path / "w.safetensors", **form).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(trunk.forward_features(x), source.forward_features(x))


def test_atomic_writes_keep_the_old_file_when_they_fail(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
