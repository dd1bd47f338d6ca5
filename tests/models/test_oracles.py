"""Our networks against timm's and torchvision's: their weights load strictly, and the logits agree."""

import pytest
import timm
import torch
import torchvision
from timm.models import resnetv2

import senet
from senet.models.cifar import PreActBottleneck

RELATIVE = 1e-5


def randomise_statistics(model):
    """Fresh batch norms hide errors: means of 0, variances of 1 and unit scales make wrong order or eps invisible."""
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
            with torch.no_grad():
                module.weight.uniform_(0.4, 0.9, generator=g)
                module.bias.normal_(0, 0.1, generator=g)


def assert_same_function(ours, theirs, state, size=64):
    ours.load_state_dict(state, strict=True)
    ours.eval()
    theirs.eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mine, expected = ours(x), theirs(x)
    error = (mine - expected).abs().max() / expected.abs().max()
    assert expected.std() > 1e-3, "the oracle's logits are all alike: the comparison would prove nothing"
    assert error < RELATIVE, f"relative difference {error:.2e}"


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


def slow_unless_quick(names):
    return [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("name", slow_unless_quick(TIMM))
def test_timm_se_weights(name):
    theirs = timm.create_model(TIMM[name], num_classes=11)
    randomise_statistics(theirs)
    assert_same_function(senet.create_model(name, num_classes=11), theirs, theirs.state_dict())


@pytest.mark.parametrize("name", slow_unless_quick(TORCHVISION))
def test_torchvision_plain_weights(name):
    theirs = getattr(torchvision.models, name)(num_classes=11)
    randomise_statistics(theirs)
    assert_same_function(senet.create_model(name, num_classes=11), theirs, theirs.state_dict())


@pytest.mark.slow
def test_senet154_with_padded_pooling_is_timms_senet154():
    theirs = timm.create_model("senet154", num_classes=11)
    randomise_statistics(theirs)
    assert_same_function(senet.create_model("senet154", num_classes=11, ceil_pool=False), theirs, theirs.state_dict())


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
    randomise_statistics(theirs)
    state = {
        k.replace("norm", "bn").replace("downsample.conv", "downsample"): v for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
