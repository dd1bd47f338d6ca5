"""Our networks against timm's and torchvision's: their weights load strictly, and the logits agree."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import resnetv2

import senet
from helpers.images import images
from helpers.networks import all_names, assert_same_function, randomized
from senet.models.cifar import PreActBottleneck

TIMM = {
    "se_resnet18": "seresnet18",
    "se_resnet34": "seresnet34",
    "se_resnet50": "seresnet50",
    "se_resnet101": "seresnet101",
    "se_resnet152": "seresnet152",
    "se_resnext50_32x4d": "seresnext50_32x4d",
    "se_resnext101_32x4d": "seresnext101_32x4d",
}
TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]
QUICK = {"se_resnet18", "se_resnet50", "se_resnext50_32x4d", "resnet18", "resnet50"}


@pytest.mark.parametrize("name", all_names(QUICK, TIMM))
def test_timm_se_weights(name):
    theirs = timm.create_model(TIMM[name], num_classes=11)
    randomized(theirs)
    assert_same_function(senet.create_model(name, num_classes=11), theirs, state=theirs.state_dict(), tolerance=1e-5)


@pytest.mark.parametrize("name", all_names(QUICK, TORCHVISION))
def test_torchvision_plain_weights(name):
    theirs = getattr(torchvision.models, name)(num_classes=11)
    randomized(theirs)
    assert_same_function(senet.create_model(name, num_classes=11), theirs, state=theirs.state_dict(), tolerance=1e-5)


@pytest.mark.slow
def test_senet154_with_padded_pooling_is_timms_senet154():
    theirs = timm.create_model("senet154", num_classes=11)
    randomized(theirs)
    assert_same_function(
        senet.create_model("senet154", num_classes=11, ceil_pool=False),
        theirs,
        state=theirs.state_dict(),
        tolerance=1e-5,
    )


def step(model, x, y):
    """Logits, every gradient by name, and the statistics after one training step's passes."""
    out = model.train()(x)
    F.cross_entropy(out, y).backward()
    grads = {f"d{name}": p.grad for name, p in model.named_parameters()}
    return {"out": out.detach()} | grads | dict(model.named_buffers())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_step_of_se_resnet50_is_timms(layout):
    theirs = randomized(timm.create_model("seresnet50", num_classes=10)).double().to(memory_format=layout)
    ours = senet.create_model("se_resnet50", num_classes=10).double().to(memory_format=layout)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(64, 2).to(memory_format=layout)
    mine, right = (step(model, x, torch.tensor([3, 7])) for model in (ours, theirs))
    assert mine.keys() == right.keys()
    for name, expected in right.items():
        error = (mine[name].double() - expected.double()).abs().max()
        assert error <= 1e-8 * expected.double().abs().max().clamp_min(1e-6), f"{name}: {error:.2e}"


def test_preactivation_unit_is_timms():
    """timm has no CIFAR pre-activation network, but its bottleneck is the same unit with the same shared activation."""
    ours = PreActBottleneck(16, 16, 2, 2, None)
    theirs = resnetv2.PreActBottleneck(
        16,
        64,
        stride=2,
        conv_layer=timm.layers.create_conv2d,
        norm_layer=timm.layers.BatchNormAct2d,
        proj_layer=resnetv2.DownsampleConv,
    )
    randomized(theirs)
    state = {
        k.replace("norm", "bn").replace("downsample.conv", "downsample"): v for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
