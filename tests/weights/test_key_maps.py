"""Files in everyone's layout, made by everyone's own networks, give the same logits here."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import senet
from helpers.messages import one_line
from helpers.networks import assert_same_function, randomized
from senet import SEConfig
from senet.weights.key_maps import LAYOUTS, OWN, recognize


def written(folder, state):
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def assert_same_logits(ours, theirs, size=64):
    """In float64; what the file rounded to float32 is the same for both."""
    assert_same_function(ours.double(), theirs.double(), size, tolerance=1e-6)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "theirs", "arguments", "layout"),
    [
        ("se_resnet50_v1", "legacy_seresnet50", {}, "Cadene, SE-ResNet"),
        ("se_resnet18", "seresnet18", {}, OWN.name),
        slow("se_resnet50", "seresnet50", {}, OWN.name),
        slow("se_resnet152_v1", "legacy_seresnet152", {}, "Cadene, SE-ResNet"),
        slow("se_resnext50_32x4d", "legacy_seresnext50_32x4d", {"ceil_pool": True}, "Cadene, SE-ResNet"),
        slow("senet154", "legacy_senet154", {}, "Cadene, SENet-154"),
        slow("inception_resnet_v2", "inception_resnet_v2", {}, OWN.name),
        slow("mobilenet_v1", "mobilenetv1_100", {}, OWN.name),
        slow("vgg16_bn", "vgg16_bn", {}, "timm, VGG"),
    ],
)
def test_timm(name, theirs, arguments, layout, tmp_path):
    network = randomized(timm.create_model(theirs, num_classes=7))
    path = written(tmp_path, network.state_dict())
    assert layout in recognize(senet.load_weights(path)[0]).name
    size = 96 if "inception" in name else 65 if "v1" in name else 64  # odd: Caffe's pooling differs there
    assert_same_logits(senet.create_model(name, 7, pretrained=path, **arguments), network, size)


def test_timms_legacy_basic_blocks_are_refused(tmp_path):
    """Names and shapes fit, but there is a ReLU between the last norm and the gate."""
    path = written(tmp_path, timm.create_model("legacy_seresnet18", num_classes=7).state_dict())
    with pytest.raises(senet.InputError, match=one_line("weights.pth: … ReLU before")):
        senet.create_model("se_resnet18", 7, se=SEConfig(), ceil_pool=True, pretrained=path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("inception_v3", "Inception-v3"),
        slow("resnet50", OWN.name),
        slow("resnext50_32x4d", OWN.name),
        slow("vgg16_bn", OWN.name),
    ],
)
def test_torchvision(name, layout, tmp_path):
    extra = {"init_weights": False} if name == "inception_v3" else {}
    network = randomized(torchvision.models.get_model(name, num_classes=7, **extra))
    path = written(tmp_path, network.state_dict())
    assert layout in recognize(senet.load_weights(path)[0]).name
    assert_same_logits(senet.create_model(name, 7, pretrained=path), network, 96 if name == "inception_v3" else 64)


@pytest.mark.parametrize(("name", "theirs"), [("se_resnet18", "seresnet18"), slow("se_resnet50", "seresnet50")])
@pytest.mark.parametrize("bias", [True, False])
def test_moskomule(name, theirs, bias, tmp_path):
    """Its gates are linear layers without bias, ``se.fc.0`` and ``se.fc.2``; all else is torchvision's."""
    network = randomized(timm.create_model(theirs, num_classes=7))
    state = {}
    for key, value in network.state_dict().items():
        if match := re.fullmatch(r"(.*\.se\.)fc([12])\.(weight|bias)", key):
            if match[3] == "bias":
                value.zero_()  # in the network too: without it, as theirs
            else:
                state[f"{match[1]}fc.{2 * int(match[2]) - 2}.weight"] = value.flatten(1)
        else:
            state[key] = value
    path = written(tmp_path, state)
    assert recognize(state).name == "moskomule/senet.pytorch"
    se = SEConfig(divisor=8, bias=bias)
    assert_same_logits(senet.create_model(name, 7, se=se, pretrained=path), network)


CADENE_WORDS = {
    "branch1x1": "1x1",
    "branch3x3_1": "3x3_reduce",
    "branch3x3_2": "3x3",
    "branch3x3dbl_1": "double_3x3_reduce",
    "branch3x3dbl_2": "double_3x3_1",
    "branch3x3dbl_3": "double_3x3_2",
    "branch_pool": "pool_proj",
}


def test_cadene_bn_inception(tmp_path):
    """Written backwards from our own network: biases before the norms, BGR, and Cadene's names."""
    network = randomized(senet.create_model("bn_inception", 7))
    g = torch.Generator().manual_seed(3)
    state = {}
    for key, value in network.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module == "fc":
            state[f"last_linear.{leaf}"] = value
            continue
        module, _, part = module.rpartition(".")
        stem = {"conv1": "conv1_7x7_s2", "conv2_reduce": "conv2_3x3_reduce", "conv2": "conv2_3x3"}
        block, _, unit = module.partition(".")
        name = stem[module] if module in stem else f"{block}_{CADENE_WORDS[unit]}"
        if part == "conv":
            state[f"{name}.weight"] = value.flip(1) if module == "conv1" else value
            state[f"{name}.bias"] = torch.randn(len(value), generator=g)
        elif leaf == "running_mean":
            state[f"{name}_bn.{leaf}"] = value + state[f"{name}.bias"]
        elif leaf != "num_batches_tracked":  # the published file is older than this counter
            state[f"{name}_bn.{leaf}"] = value
    assert recognize(state).name == "Cadene, BN-Inception"
    ours = senet.create_model("bn_inception", 7, pretrained=written(tmp_path, state))
    assert_same_logits(ours, network)
    for key, value in network.state_dict().items():  # float32 rounds a mean that a bias was added to and taken from
        torch.testing.assert_close(ours.state_dict()[key].to(value.dtype), value, rtol=0, atol=5e-7)


def test_every_layout_is_recognised_by_its_own_mark_alone():
    for layout in LAYOUTS:
        theirs = [row[0].format(s=2, b=1, m="3a", module="layer1.0", rest="weight") for row in layout.rows]
        mark = layout.mark.replace(".+", "layer1.0").replace("\\", "")
        assert recognize(dict.fromkeys([*theirs, mark, "conv1.weight"])) is layout
    for name in ("se_resnet18", "vgg16_bn", "inception_v3", "se_bn_inception", "se_shake26_2x96d"):
        with torch.device("meta"):
            assert recognize(senet.create_model(name).state_dict()) is OWN


def test_the_file_name_says_nothing(tmp_path):
    """A plain file under a misleading name, and the wrappers of DataParallel and torch.compile."""
    network = senet.create_model("se_resnet8", 3).eval()
    for index, wrapper in enumerate(("", "module.", "_orig_mod.", "module._orig_mod.")):
        path = tmp_path / f"legacy_senet154-moskomule-{index}.safetensors"
        safetensors.torch.save_file({wrapper + key: v.clone() for key, v in network.state_dict().items()}, path)
        ours = senet.create_model("se_resnet8", 3, pretrained=path)
        assert all(torch.equal(v, ours.state_dict()[key]) for key, v in network.state_dict().items())


def test_two_keys_that_would_be_one_are_refused(tmp_path):
    state = senet.create_model("se_resnet18", 3).state_dict()
    both = {"layer0.conv1.weight": state["conv1.weight"]} | state
    with pytest.raises(senet.InputError, match=one_line("weights.pth: two weights … 'conv1.weight'")):
        senet.create_model("se_resnet18", 3, pretrained=written(tmp_path, both))


def test_the_documentation_has_every_key_map():
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        assert f"**{layout.name}**" in text
        assert layout.changes == "none" or layout.changes in text
        for theirs, ours in layout.blobs + layout.rows:
            assert f"`{theirs}` | `{ours}`" in text, f"{layout.name}: {theirs}"
