"""A folded network against the same network whose gates are held constant by hooks."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import senet
from helpers.images import maps
from helpers.networks import BATCH_NORMS, with_statistics_of
from senet import SEConfig, find_gates
from senet.nn.constant_gate import ConstantGate

PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")
SLOW = pytest.mark.slow


def settled(model, channels, size):
    """In float64, with gates and norms of their own (some of timm's norms begin with zeros)."""
    generator = torch.Generator().manual_seed(3)
    for norm in (module for module in model.double().modules() if isinstance(module, BATCH_NORMS)):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    for gate in find_gates(model):
        for parameter in gate.module.parameters():
            nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return with_statistics_of(model, *maps(2, 4, channels, *size, seed=3, dtype=torch.float64))


def recorded(model, channels, size, **kwargs):
    batches = maps(2, 3, channels, *size, seed=4, dtype=torch.float64)
    return senet.record_excitations(model, list(batches.to(next(model.parameters()).dtype)), **kwargs)


def held(model, excitations, names):
    """A copy whose gates give their mean excitation times their input."""
    model = copy.deepcopy(model)
    for name in names:
        mean = torch.from_numpy(excitations[name].overall()[0])
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, mean=mean: torch.einsum("nc...,c->nc...", args[0], mean.to(args[0].dtype))
        )
    return model


def compare(model, size=(32, 32), channels=3, constants=True):
    """Fold all gates and compare, in float64 and float32; returns the report."""
    settled(model, channels, size)
    excitations = recorded(model, channels, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = senet.fold(model, excitations, constants=constants, example_input=torch.randn(1, channels, *size).double())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(find_gates(model)) == len(report.sites)
    names = [site.name for site in report.sites if site.fate != "kept"]
    constant = held(model, excitations, names)
    x = torch.randn(4, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = constant(x)
        assert (report.network(x) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        gates = held(model, excitations, [])(x)
        assert (gates - wanted).abs().max() > 1e-6 * wanted.abs().max(), "the gates do nothing; the test proves nothing"
        # In float32 both round; what the gates' network loses in its depth by itself is not the fold's doing.
        small, own = (network.float()(x.float()) for network in (report.network, constant))
        allowed = 1e-6 * wanted.abs().max() + 2 * (own - wanted).abs().max()
        assert (small - wanted).abs().max() <= allowed
    assert not [gate for gate in find_gates(report.network) if gate.name in names]
    return report


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["se_resnet8", "se_wrn16_8_narrow"])
def test_every_placement_of_ours(name, placement):
    config = SEConfig(reduction=4, placement=placement)
    if name == "se_resnet8":
        model = senet.create_model(name, 5, se=config)
    else:
        from senet.models.cifar import CifarResNet, PreActBasic

        model = CifarResNet(PreActBasic, 2, 1, num_classes=5, se=config)
    report = compare(model, (16, 16))
    fates = [site.fate for site in report.sites]
    if placement in ("standard", "pre", "3x3"):
        assert set(fates) == {"folded"}
    elif placement == "identity" and name == "se_resnet8":  # its shortcuts are the input itself, or have no weights
        assert set(fates) == {"constant"}
        assert all("added to another" in site.reason for site in report.sites)
    else:
        assert "folded" in fates  # where the shortcut has a projection, where the classifier follows
        assert "constant" in fates


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se_resnet50", "se_resnext50_32x4d", "se_mobilenet_v1", "se_shufflenet_v1_g3"])
def test_large_networks_of_ours(name):
    report = compare(senet.create_model(name, 5), (64, 64))
    assert len(report.with_fate("folded")) == len(report.sites)


@pytest.mark.parametrize("change", [{"squeeze": "none"}, {"squeeze": "max"}, {"gate": "relu"}, {"identity_init": True}])
def test_every_kind_of_gate(change):
    report = compare(senet.create_model("se_resnet8", 5, se=SEConfig(4, **change)), (16, 16))
    assert len(report.with_fate("folded")) == 3


def test_where_the_factors_go():
    model = senet.create_model("se_resnet18", 5, se=SEConfig(placement="post"))
    into = {site.name: site.into for site in compare(model, (32, 32)).sites}
    assert into["layer1.0.se"] == ()
    assert into["layer1.1.se"] == ("layer2.0.downsample.0", "layer2.0.conv1")  # all who read the map
    assert into["layer2.0.se"] == ("layer2.0.bn2", "layer2.0.downsample.1")  # back through ReLU and sum
    assert into["layer4.1.se"] == ("fc",)  # through the pooling
    model = senet.create_model("se_resnet18", 5, se=SEConfig(placement="identity", stages=(3,)))
    report = compare(model)
    assert [(s.name, s.stage, s.into) for s in report.sites] == [
        ("layer2.0.se", 3, ("layer2.0.downsample.1",)),
        ("layer2.1.se", 3, ()),
    ]


def test_gates_that_close_or_turn_the_sign_go_forward_past_a_relu():
    gate = senet.SqueezeExcite(8, SEConfig(4, gate="tanh"))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), gate, nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    settled(model, 3, (8, 8))
    excitations = recorded(model, 3, (8, 8))
    mean = excitations["3"].overall()[0]
    assert mean.min() < 0 < mean.max()
    (site,) = senet.fold(model, excitations).sites
    assert site.fate == "kept"
    assert "relu in 2" in site.reason
    assert "max_pool2d in 4" in site.reason
    model[4] = nn.AvgPool2d(2)
    assert compare(model, (8, 8)).sites[0].into == ("5",)


def test_factors_go_through_flatten_concatenation_and_groups():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1, bias=False)
            self.wide, self.narrow = senet.SqueezeExcite(10, SEConfig(2)), senet.SqueezeExcite(6, SEConfig(2))
            self.grouped = nn.Conv2d(10, 4, 3, padding=1, groups=2, padding_mode="reflect")
            self.last = nn.Linear(10 * 16, 3)

        def forward(self, x):
            y = self.wide(torch.cat([self.a(x), self.narrow(torch.nn.functional.silu(self.b(x)))], 1))
            return self.last(y.flatten(1)), self.grouped(torch.nn.functional.pad(y, (1, 0, 0, 1)))

    model = Net().double().eval()
    excitations = recorded(model, 3, (4, 4))
    report = senet.fold(model, excitations, example_input=torch.zeros(1, 3, 4, 4).double())
    into = {site.name: site.into for site in report.sites}
    assert set(into.pop("wide")) == {"grouped", "last"}
    assert into == {"narrow": ()}  # what reads it is another gate
    x = torch.randn(2, 3, 4, 4).double()
    constant = held(model, excitations, [site.name for site in report.sites if site.fate == "folded"])
    for found, wanted in zip(report.network(x), constant(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


@pytest.mark.parametrize("how", ["standardised", "shared", "twice", "output", "parametrised"])
def test_what_cannot_take_the_factors_is_left_and_named(how):
    first = Standardised(3, 8, 3) if how == "standardised" else nn.Conv2d(3, 8, 3, padding=1)
    if how == "parametrised":
        nn.utils.parametrizations.weight_norm(first)
    model = nn.Sequential(first, senet.SqueezeExcite(8, SEConfig(4)), nn.Sigmoid())
    if how == "shared":
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), *model)
        model[2].bias = model[0].bias = None
        model[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        model[1] = nn.Conv2d(8, 3, 1)
        model[0].weight = model[2].weight
    elif how == "twice":
        model = nn.Sequential(model[0], model[1], nn.Conv2d(8, 8, 1), model[1])
    elif how == "output":
        model = nn.Sequential(model[0], nn.SiLU(), model[1])
    model = model.double().eval()
    excitations = recorded(model[:2] if how == "twice" else model, 3, (8, 8))
    (site,) = senet.fold(model, excitations).sites
    assert site.fate == "kept"
    said = {
        "twice": "it is called 2 times",
        "output": "it follows silu in 1, which blocks the factors; after it, the feature map is the network's output",
    }
    assert said.get(how, "read by sigmoid") in site.reason
    assert "convolution in" in site.reason or how in ("twice", "output")


def test_a_map_that_leaves_the_network_too_is_not_rescaled():
    """The features are returned in a list, beside the classes: only the proof sees that they change."""
    model = senet.create_model("se_resnet8", 5, se=SEConfig(4, placement="post"), features_only=True)
    settled(model, 3, (8, 8))
    excitations = recorded(model, 3, (8, 8))
    report = senet.fold(model, excitations, example_input=torch.zeros(1, 3, 8, 8).double())
    assert report.with_fate("folded") == []


FAMILIES = [
    "timm:seresnet18",
    "timm:mobilenetv3_small_050",
    "timm:regnety_002",
    "torchvision:mobilenet_v3_small",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "timm:seresnext26d_32x4d",
            "timm:legacy_seresnet18",
            "timm:efficientnet_b0",
            "timm:tf_efficientnetv2_b0",
            "timm:ese_vovnet19b_dw",
            "timm:ghostnet_100",
            "timm:mnasnet_small",
            "timm:semnasnet_075",
            "timm:rexnet_100",
            "timm:fbnetv3_b",
            "torchvision:efficientnet_b0",
            "torchvision:regnet_y_400mf",
        )
    ),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_other_libraries(name):
    model = senet.create_model(name, 7)
    report = compare(model, (64, 64))
    assert report.with_fate("folded")
    assert all(site.reason for site in report.sites if site.fate != "folded")


@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("mobilenet_v2", marks=SLOW), pytest.param("densenet121", marks=SLOW)]
)
def test_attached_gates(name):
    model = senet.create_model(f"torchvision:{name}", 7)
    keys = set(model.state_dict())
    senet.attach(model, SEConfig(reduction=8), example_input=torch.zeros(1, 3, 64, 64))
    report = compare(model, (64, 64))
    # In a DenseNet, norms follow the gates, whose statistics in training would not be those of the network before.
    assert bool(report.with_fate("folded")) != (name == "densenet121")
    scales = {f"{name}.scale" for name in report.with_fate("constant")}
    assert set(report.network.state_dict()) == keys | scales
    assert not scales or name == "densenet121"


def test_attached_gates_that_cannot_fold_become_constants_and_go_again():
    model = senet.create_model("torchvision:resnet18", 5)
    senet.attach(
        model, SEConfig(placement="post"), sites=["layer1.0", "layer1.1"], example_input=torch.zeros(1, 3, 32, 32)
    )
    report = compare(model)
    assert report.with_fate("constant") == ["layer1.0.se"]
    assert isinstance(report.network.layer1[0].se, ConstantGate)
    x = torch.randn(2, 3, 32, 32)
    network = report.network.float().eval()
    before = network(x)
    torch.testing.assert_close(senet.accelerate(network)(x), before, rtol=1e-4, atol=1e-4)
    senet.detach(network)
    assert not any("scale" in key for key in network.state_dict())


def folded_resnet8(constants=False, placement="standard", **kwargs):
    model = senet.create_model("se_resnet8", 5, se=SEConfig(4, placement=placement))
    settled(model, 3, (16, 16)).float()
    excitations = recorded(model, 3, (16, 16))
    return senet.fold(model, excitations, constants=constants, example_input=torch.zeros(1, 3, 16, 16), **kwargs)


@pytest.mark.parametrize(("sites", "placement"), [("*", "standard"), ("layer2.*", "standard"), ("*", "post")])
def test_the_result_saves_and_is_made_again(sites, placement, tmp_path):
    report = folded_resnet8(constants=True, placement=placement, sites=sites)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = report.network(x)
    path = senet.save(report.network, tmp_path / "folded.safetensors")
    again, metadata = senet.build_from_checkpoint(path)
    assert metadata["folded"]
    with torch.no_grad():
        assert torch.equal(again(x), wanted)
        assert torch.equal(senet.from_pretrained(path)(x), wanted)
        assert torch.equal(copy.deepcopy(report.network)(x), wanted)
    buffer = io.BytesIO()
    torch.save(report.network, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)
    save_file(report.network.state_dict(), tmp_path / "weights.safetensors")
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))


def test_attached_and_folded_saves_and_is_made_again(tmp_path):
    model = senet.create_model("torchvision:resnet18", 5)
    senet.attach(
        model,
        SEConfig(placement="post"),
        sites=["layer1.0", "layer1.1", "layer2.0"],
        example_input=torch.zeros(1, 3, 32, 32),
    )
    settled(model, 3, (32, 32)).float()
    excitations = recorded(model, 3, (32, 32))
    report = senet.fold(model, excitations, "layer1*", constants=True, example_input=torch.zeros(1, 3, 32, 32))
    assert [site.fate for site in report.sites] == ["constant", "folded", "kept"]
    path = senet.save(report.network, tmp_path / "folded.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(senet.build_from_checkpoint(path)[0](x), report.network(x))


def test_what_was_folded_folds_on(tmp_path):
    report = folded_resnet8(sites="layer1*")
    again = record_and_fold(report.network, "layer3*")
    assert [site.name for site in again.sites] == ["layer2.0.se", "layer3.0.se"]
    path = senet.save(again.network, tmp_path / "folded.safetensors")
    network, metadata = senet.build_from_checkpoint(path)
    assert metadata["folded"] == {"layer1.0.se": 0, "layer3.0.se": 0}
    assert [gate.name for gate in find_gates(network)] == ["layer2.0.se"]


def record_and_fold(model, sites="*"):
    return senet.fold(model, recorded(model, 3, (16, 16)), sites, example_input=torch.zeros(1, 3, 16, 16))


def test_wrapped_networks_are_unwrapped():
    model = senet.create_model("se_resnet8", 5, se=SEConfig(4)).eval()
    report = record_and_fold(torch.compile(model))
    assert type(report.network) is type(model)
    assert len(report.with_fate("folded")) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_the_result_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = folded_resnet8(constants=True, placement="post").network
    x = torch.randn(2, 3, 16, 16)
    torch.onnx.export(network, (x,), tmp_path / "folded.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-4)


def test_all_gates_of_ours_folded_leave_the_plain_network():
    network = folded_resnet8().network
    plain = senet.create_model("resnet8", 5)
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.eval()(x), network(x))


def test_the_result_trains_and_exports():
    network = folded_resnet8(constants=True, placement="post").network
    assert any(isinstance(module, ConstantGate) for module in network.modules())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exported = torch.export.export(network, (x,)).module()
        torch.testing.assert_close(exported(x), network(x), rtol=1e-5, atol=1e-5)
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(x), torch.tensor([0, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_training_mode_is_the_same_network_too():
    """Factors stand behind a norm's statistics, so that they hold with a batch's own."""
    model = senet.create_model("se_resnet8", 5, se=SEConfig(4))
    settled(model, 3, (16, 16))
    excitations = recorded(model, 3, (16, 16))
    network = senet.fold(model, excitations, example_input=torch.zeros(1, 3, 16, 16).double()).network.train()
    constant = held(model, excitations, list(excitations.sites)).train()
    x = torch.randn(4, 3, 16, 16).double()
    torch.testing.assert_close(network(x), constant(x), rtol=1e-11, atol=1e-11)


def test_one_dimension_and_three():
    for axes, conv, norm in ((1, nn.Conv1d, nn.BatchNorm1d), (3, nn.Conv3d, nn.BatchNorm3d)):
        model = nn.Sequential(
            conv(3, 8, 3, padding=1), norm(8), senet.SqueezeExcite(8, SEConfig(4)), nn.ReLU(), conv(8, 2, 1)
        )
        assert compare(model, (6,) * axes).sites[0].into == ("1",)
