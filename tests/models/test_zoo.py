"""One tester over every registered name."""

import copy
import math

import pytest
import timm
import torch

import senet
from helpers.networks import all_names, with_statistics_of
from senet import SEConfig, SqueezeExcite

QUICK = {"resnet8", "se_resnet20", "resnet18", "se_resnet18", "se_resnet50_v1", "se_resnext50_32x4d", "se_preresnet164"}
QUICK |= {"se_bn_inception", "se_shufflenet_v1_g3"}
NAMES = all_names(QUICK)


def small_input(name, batch=2, size=None):
    spec = senet.model_spec(name)
    side = 16 if spec.input_size == 32 else 64
    if spec.min_size > side:
        side = spec.min_size + 32  # room for a last map of more than one pixel
    if size is not None:
        side = max(size, spec.min_size)
    return torch.randn(batch, 3, side, side)


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_reaches_every_parameter(name):
    model = senet.create_model(name, num_classes=5)
    # A ReLU bottleneck of one or two channels may start dead: bias it open, so that no gradient means not connected.
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            torch.nn.init.ones_(module.fc1.bias)
    out = model(small_input(name))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_batch_one_features_and_stages(name):
    model = senet.create_model(name, num_classes=0).eval()
    least = senet.model_spec(name).min_size
    unpadded = least > 64  # such networks lose a border at each convolution: their strides are only nearly powers of 2
    height, width = (299, 331) if unpadded else (64, 96)
    with torch.no_grad():
        features = model(small_input(name, batch=1, size=45))
        assert features.shape == (1, model.num_features)
        wide = model(torch.randn(1, 3, max(37, least), max(70, least + 8)))
        assert wide.shape == (1, model.num_features)
        maps = model.forward_stages(torch.randn(1, 3, height, width))
    assert [m.shape[1] for m in maps] == list(model.feature_channels)
    strides = [(height / m.shape[2], width / m.shape[3]) for m in maps]
    if unpadded:
        strides = [tuple(2 ** math.floor(math.log2(s)) for s in pair) for pair in strides]
    assert strides == [(s, s) for s in model.feature_strides]


@pytest.mark.parametrize("name", NAMES)
def test_features_only_gives_the_stages_with_the_same_keys(name):
    classifier = senet.create_model(name, num_classes=3).eval()
    trunk = senet.create_model(name, features_only=True).eval()
    state = {k: v for k, v in classifier.state_dict().items() if not k.startswith(f"{classifier.head_name}.")}
    trunk.load_state_dict(state, strict=True)
    x = small_input(name, batch=1)
    with torch.no_grad():
        maps = trunk(x)
        torch.testing.assert_close(maps[-1], classifier.forward_features(x))
    assert len(maps) == len(trunk.feature_strides)


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_and_deepcopy(name):
    # float64: the layouts add in different orders, and a deep network amplifies float32's rounding to per cents
    model = senet.create_model(name, num_classes=4).double().eval()
    x = small_input(name).double()
    with torch.no_grad():
        expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        x_last = x.to(memory_format=torch.channels_last)
        assert last.forward_features(x_last).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x_last), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def autocast_error(model, x):
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16
    return ((half.float() - exact).norm() / exact.norm()).item()


def with_timms_gates(model):
    """The same network and weights, each gate replaced by timm's module, which computes the FCs in bfloat16."""
    model = copy.deepcopy(model)
    for name, gate in list(model.named_modules()):
        if isinstance(gate, SqueezeExcite):
            theirs = timm.layers.SEModule(gate.channels, rd_channels=gate.fc1.out_channels)
            theirs.load_state_dict(gate.state_dict(), strict=True)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, theirs)
    return model


@pytest.mark.parametrize("name", [p for p in NAMES if p.values[0].startswith("se")])
def test_under_autocast_the_gates_are_at_least_as_exact_as_timms(name):
    model = senet.create_model(name, num_classes=50)
    x = small_input(name, batch=8)
    with_statistics_of(model, x)
    assert autocast_error(model, x) < 1.5 * autocast_error(with_timms_gates(model), x) + 0.01


@pytest.mark.parametrize("name", NAMES)
def test_twin_differs_only_by_the_gates_and_starts_alike(name):
    spec = senet.model_spec(name)
    plain_name, se_name = (spec.name, spec.twin) if spec.se is None else (spec.twin, spec.name)
    torch.manual_seed(3)
    plain = senet.create_model(plain_name, num_classes=4)
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    se = senet.create_model(se_name, num_classes=4)
    assert torch.equal(torch.rand(1), after_plain), "the twins leave the random generator in different states"
    plain_state, se_state = plain.state_dict(), se.state_dict()
    assert all(".se." in key for key in se_state.keys() - plain_state.keys())
    assert plain_state.keys() <= se_state.keys()
    assert se_state.keys() > plain_state.keys()
    different = [key for key, value in plain_state.items() if not torch.equal(value, se_state[key])]
    assert different == []


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_initialisation_is_he(name):
    torch.manual_seed(5)
    one = senet.create_model(name, num_classes=4)
    torch.manual_seed(5)
    two = senet.create_model(name, num_classes=4)
    other = senet.create_model(name, num_classes=4)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    heads = [list(model.get_classifier().parameters())[-2] for model in (one, other)]
    assert not torch.equal(*heads)
    widest = max(
        (m for n, m in one.named_modules() if isinstance(m, torch.nn.Conv2d) and ".se." not in n),
        key=lambda m: m.weight.numel(),
    )
    fan_out = widest.out_channels * widest.kernel_size[0] ** 2 // widest.groups
    # PyTorch's fan_out of a grouped convolution counts every group's outputs
    fan_out *= widest.groups
    assert abs(widest.weight.std().item() * (fan_out / 2) ** 0.5 - 1) < 0.05


def outputs_of_twins(name, training, **config):
    """The outputs of the plain network and of the one with identity gates, with the same random numbers."""
    x, outputs = small_input(name), []
    for se in (None, SEConfig(identity_init=True, **config)):
        torch.manual_seed(7)
        network = senet.create_model(name, num_classes=4, se=se).train(training)
        assert any(isinstance(m, SqueezeExcite) for m in network.modules()) == (se is not None)
        with torch.no_grad():
            outputs.append(network(x))
    return outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_identity_gates_leave_the_plain_networks_output_bit_equal(name, training):
    assert torch.equal(*outputs_of_twins(name, training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn16_8", "shufflenet_v1_g3"])
def test_so_do_they_at_every_place(name, placement, training):
    assert torch.equal(*outputs_of_twins(name, training, placement=placement))


# se_wrn16_8 stands for the networks that activate first: it is a tenth as deep.
EXPORTED = all_names(QUICK - {"se_preresnet164"} | {"se_wrn16_8"})


@pytest.mark.parametrize("name", EXPORTED)
def test_traces_and_exports(name):
    model = senet.create_model(name, num_classes=3).double().eval()
    x = small_input(name).double()
    with torch.no_grad():
        expected = model(x)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), expected)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-10, atol=1e-10)
    assert all("senet" not in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "preresnet164", "wrn16_8"])
def test_every_placement_in_every_kind_of_block(name, placement):
    config = SEConfig(reduction=4, placement=placement)
    model = senet.create_model(name, num_classes=3, se=config)
    out = model(small_input(name))
    out.square().sum().backward()
    reached = [p.grad is not None for n, p in model.named_parameters() if ".se." in n]
    assert reached
    assert all(reached)


def test_chosen_stages_only():
    model = senet.create_model("resnet50", se=SEConfig(stages=(3, 5)))
    stages = {name.split(".")[0] for name, module in model.named_modules() if isinstance(module, SqueezeExcite)}
    assert stages == {"layer2", "layer4"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.9's own Dynamo looks
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_without_graph_breaks(layout):
    model = senet.create_model("se_resnet8", num_classes=3).to(memory_format=layout)
    x = torch.randn(2, 3, 16, 16).to(memory_format=layout)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a break is an error
    assert compiled(x).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", senet.list_models())
def test_every_network_compiles_as_one_graph(name):
    torch.compiler.reset()
    model, x = senet.create_model(name, num_classes=3).eval().double(), small_input(name).double()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in senet.list_models() if senet.model_spec(n).min_size > 1])
def test_the_smallest_size_is_the_smallest(name):
    side = senet.model_spec(name).min_size
    with torch.device("meta"):
        model = senet.create_model(name, in_chans=1, num_classes=3).eval()
        assert model(torch.zeros(1, 1, side, side)).shape == (1, 3)
        with pytest.raises(RuntimeError):  # PyTorch's, of a window that finds no place
            model(torch.zeros(1, 1, side - 1, side - 1))
