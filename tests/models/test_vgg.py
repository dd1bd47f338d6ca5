"""VGG-16 with batch norm against torchvision's, and its 13 gates."""

import pytest
import torch
import torchvision
from torch import nn

import senet
from helpers.messages import one_line
from helpers.networks import assert_same_function, randomized
from senet import InputError, SEConfig, SqueezeExcite
from senet.cost.count import model_cost

CHANNELS = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
# Where torchvision's features.N have the ReLU of each of the 13 convolutions.
RELUS = [
    i
    for i, layer in enumerate(torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True))
    if isinstance(layer, nn.ReLU)
]


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 70])
def test_torchvisions_weights_give_torchvisions_logits(side):
    theirs = randomized(torchvision.models.vgg16_bn(num_classes=7).double(), (0.8, 1.2))
    ours = senet.create_model("vgg16_bn", num_classes=7).double()
    assert_same_function(ours, theirs, side, state=theirs.state_dict(), spread=1e-6)


def test_keys_are_torchvisions_and_the_gates_shift_none():
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn().state_dict()
        plain, gated = (senet.create_model(name).state_dict() for name in ("vgg16_bn", "se_vgg16_bn"))
    assert {key: value.shape for key, value in plain.items()} == {key: value.shape for key, value in theirs.items()}
    added = {key.rpartition(".se.")[0] for key in gated.keys() - plain.keys()}
    assert added == {f"features.{index}" for index in RELUS}


def test_parameters():
    plain, se = model_cost("vgg16_bn"), model_cost("se_vgg16_bn")
    assert plain.params == torchvision.models.VGG16_BN_Weights.DEFAULT.meta["num_params"]
    fcs = sum(2 * channels**2 // 16 + channels // 16 + channels for channels in CHANNELS)
    assert se.params - plain.params == fcs


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return senet.create_model("se_vgg16_bn", num_classes=0).eval()


def test_each_gate_sees_what_a_relu_gave_and_feeds_what_follows(trunk):
    seen, following = [], []
    gates = [module for module in trunk.modules() if isinstance(module, SqueezeExcite)]
    behind = [trunk.features[index + 1] for index in RELUS]
    hooks = [gate.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for gate in gates]
    hooks += [layer.register_forward_pre_hook(lambda _, args: following.append(args[0])) for layer in behind]
    with torch.no_grad():
        trunk(torch.randn(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert [entry.shape[1] for entry, _ in seen] == CHANNELS
    assert all(entry.min() == 0 for entry, _ in seen)
    assert all(torch.equal(out, entry) for (_, out), entry in zip(seen, following, strict=True))


def test_features_are_the_maps_before_each_pooling_but_the_first(trunk):
    x = torch.randn(1, 3, 64, 64)
    poolings = [i for i, layer in enumerate(trunk.features) if isinstance(layer, nn.MaxPool2d)]
    with torch.no_grad():
        maps = trunk.forward_stages(x)
        for number, layer in enumerate(trunk.features):
            if number in poolings[1:]:
                assert torch.equal(maps[poolings.index(number) - 1], x)
            x = layer(x)
    assert torch.equal(maps[-1], x)


def test_chosen_stages_and_the_one_placement():
    with torch.device("meta"):
        model = senet.create_model("se_vgg16_bn", se=SEConfig(stages=(1, 4)))
        gates = [name for name, module in model.named_modules() if isinstance(module, SqueezeExcite)]
        assert gates == [f"features.{index}.se" for index in (*RELUS[:2], *RELUS[7:10])]
        with pytest.raises(InputError, match=one_line("placement='post' … residual")):
            senet.create_model("se_vgg16_bn", se=SEConfig(placement="post"))


def test_a_new_classifier_keeps_the_hidden_layers():
    with torch.device("meta"):
        model = senet.create_model("vgg16_bn", num_classes=5)
        hidden, dropout = model.classifier[0], model.classifier[2]
        model.reset_classifier(3)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert model.classifier[0] is hidden
        assert dropout.p == 0.5
        model.reset_classifier(0)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
        model.reset_classifier(4)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
