"""timm knows the zoo, and treats it as its own: timm's networks with the same weights are the oracle."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import senet
from helpers.messages import one_line
from helpers.networks import all_names
from senet import SEConfig
from senet.data.transforms import TransformSpec
from senet.hub.timm_registry import input_cfg


@pytest.fixture(autouse=True, scope="module")
def names():
    return senet.register_timm()


def test_every_network_is_listed_and_asking_twice_changes_nothing(names):
    assert names == [f"senet_{name}" for name in senet.list_models()]
    assert set(timm.list_models("senet_*")) == set(names)
    assert senet.register_timm() == names
    assert senet.register_timm("se_resnet2*") == ["senet_se_resnet20"]
    assert set(timm.list_models("*", module="timm_registry")) == set(names)


def test_timms_own_names_still_lead_to_timms_networks():
    assert "senet154" in timm.list_models()
    assert timm.get_pretrained_cfg("senet_se_resnet18").architecture == "senet_se_resnet18"
    assert type(timm.create_model("resnet18")).__module__.startswith("timm.")


def test_arguments_arrive():
    model = timm.create_model("senet_se_resnet8", num_classes=7, in_chans=1, drop_rate=0.25, se=SEConfig(4))
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    assert model.dropout.p == 0.25
    assert model.layer1[0].se.config == SEConfig(4)
    assert model.num_classes == 7
    for wrong in ({"drop_path_rate": 0.1}, {"global_pool": ""}):
        with pytest.raises(senet.InputError, match=next(iter(wrong))):
            timm.create_model("senet_se_resnet8", **wrong)


def test_the_configuration_feeds_timms_data_loading():
    model = timm.create_model("senet_se_resnet20")
    assert model.default_cfg is model.pretrained_cfg
    assert (model.default_cfg["first_conv"], model.default_cfg["classifier"]) == ("conv1", "fc")
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert resolve_model_data_config(model)["crop_pct"] == 1.0
    with torch.device("meta"):
        vgg = timm.create_model("senet_vgg16_bn", num_classes=2)
    assert (vgg.default_cfg["first_conv"], vgg.default_cfg["classifier"]) == ("features.0", "classifier.6")
    assert vgg.default_cfg["min_input_size"] == (3, 32, 32)


@pytest.mark.parametrize("spec", [TransformSpec(24), TransformSpec(24, augment="cifar"), TransformSpec(24, resize=40)])
def test_crop_and_size_are_those_of_the_transform(spec):
    cfg = input_cfg(3, 224, spec.to_dict())
    assert cfg["input_size"] == (3, 24, 24)
    assert round(24 / cfg["crop_pct"]) == spec.eval_resize


@pytest.mark.parametrize("theirs", ["resnet18", "seresnet50"])
def test_features_and_head_are_those_of_timms_network(theirs):
    oracle = timm.create_model(theirs, num_classes=5).double().eval()
    ours = timm.create_model(f"senet_{theirs.replace('seresnet', 'se_resnet')}", num_classes=5).double().eval()
    ours.load_state_dict(oracle.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        last, expected = oracle.forward_intermediates(x, indices=[1, 2, 3, 4])  # their 0 is the stem
        mine, maps = ours.forward_intermediates(x)
        torch.testing.assert_close([mine, *maps], [last, *expected])
        torch.testing.assert_close(ours.forward_intermediates(x, indices=2, intermediates_only=True), expected[-2:])
        early, _ = ours.forward_intermediates(x, indices=[-3], stop_early=True)
        torch.testing.assert_close(early, expected[1])
        for pre_logits in (False, True):
            torch.testing.assert_close(
                ours.forward_head(mine, pre_logits=pre_logits), oracle.forward_head(last, pre_logits=pre_logits)
            )
    assert [entry["reduction"] for entry in ours.feature_info] == [e["reduction"] for e in oracle.feature_info[1:]]
    assert [entry["num_chs"] for entry in ours.feature_info] == [e["num_chs"] for e in oracle.feature_info[1:]]
    assert [entry["module"] for entry in ours.feature_info] == [e["module"] for e in oracle.feature_info[1:]]
    assert (ours.num_features, ours.head_hidden_size) == (oracle.num_features, oracle.head_hidden_size)


def test_the_head_of_vgg_is_timms_too():
    with torch.device("meta"):
        oracle = timm.create_model("vgg16_bn", num_classes=5)
    ours = timm.create_model("senet_vgg16_bn", num_classes=5)
    assert ours.head_hidden_size == oracle.head_hidden_size == 4096
    x = ours.eval().forward_features(torch.randn(1, 3, 32, 32))
    hidden = ours.forward_head(x, pre_logits=True)
    assert hidden.shape == (1, 4096)
    assert torch.equal(ours.classifier[-1](hidden), ours.forward_head(x))


def test_stages_that_are_not_there_are_named():
    model = senet.create_model("resnet8")
    for wrong in ([3], [-4], 4, 0, []):
        with pytest.raises(senet.InputError, match=one_line("0 to 2")):
            model.forward_intermediates(torch.randn(1, 3, 8, 8), indices=wrong)
    with pytest.raises(senet.InputError, match="NLC"):
        model.forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NLC")


QUICK = ["se_resnet8", "se_preresnet164", "shufflenet_v1_g3", "se_bn_inception", "mobilenet_v1"]
EACH = all_names(QUICK)


@pytest.mark.parametrize("name", EACH)
def test_features_only_gives_the_chosen_stages_and_holds_no_other_parameters(name):
    spec = senet.model_spec(name)
    side = max(32, spec.min_size + 1)
    torch.manual_seed(2)
    whole = senet.create_model(name).eval()
    torch.manual_seed(2)
    trunk = timm.create_model(f"senet_{name}", features_only=True, out_indices=(0, 1)).eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected, maps = whole.forward_stages(x)[:2], trunk(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert trunk.feature_info.channels() == [m.shape[1] for m in maps]
    assert trunk.feature_info.reduction() == list(whole.feature_strides[:2])
    trunk.train()(x)[-1].square().mean().backward()
    # a parameter that gets no gradient stops training on several devices
    assert [key for key, parameter in trunk.named_parameters() if parameter.grad is None] == []
    last = timm.create_model(f"senet_{name}", features_only=True, out_indices=(-1,)).eval()
    with torch.no_grad():
        assert torch.equal(last(x)[0], whole_with(last, name)(x))


def whole_with(trunk, name):
    """The whole network's last map, with the trunk's weights."""
    model = senet.create_model(name, num_classes=0).eval()
    model.load_state_dict(trunk.model.state_dict(), strict=True)
    return model.forward_features


@pytest.mark.parametrize("name", ["se_resnet8", "vgg16_bn"])
def test_a_new_head_lies_where_the_network_lies(name):
    model = timm.create_model(f"senet_{name}", num_classes=4).bfloat16()  # no network's type at its start
    for classes in (6, 0, 3):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        with torch.no_grad():
            out = model.eval()(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
        assert out.shape == (1, classes or model.num_features)
    with torch.device("meta"):
        bare = senet.create_model(name)
    bare.reset_classifier(2)
    assert {p.device.type for p in bare.parameters()} == {"meta"}


def test_timm_loads_what_was_saved_here(tmp_path):
    config = SEConfig(4, gate="hard_sigmoid", stages=(2, 3))
    model = senet.create_model("se_resnet8", 3, se=config, drop_rate=0.5).eval()
    spec = TransformSpec(24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), interpolation="bicubic")
    senet.save(model, tmp_path / "saved", {"transform": spec.to_dict(), "classes": ["a", "b", "c"]})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(x), model(x))
    assert loaded.dropout.p == 0.5
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    data = resolve_model_data_config(loaded)
    assert (*data["input_size"], data["interpolation"]) == (3, 24, 24, "bicubic")
    assert [*data["mean"], *data["std"]] == [0.4, 0.5, 0.6, 0.2, 0.2, 0.3]
    other = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=9, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 9)
    assert torch.equal(other.layer3[0].conv2.weight, model.layer3[0].conv2.weight)


def test_a_file_of_timms_overlay_and_default_weights(tmp_path):
    model = senet.create_model("se_resnet8")
    path = senet.save(model, tmp_path / "w.safetensors")
    loaded = timm.create_model("senet_se_resnet8", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    with pytest.raises(senet.InputError, match="se_resnet8"):
        timm.create_model("senet_se_resnet8", pretrained=True)  # nobody published weights of it


def test_without_timm_the_error_says_what_to_install():
    script = (
        "import sys; sys.modules['timm'] = sys.modules['timm.models'] = None\nimport senet\n"
        "try: senet.register_timm()\nexcept senet.InputError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'timm" in run.stdout
