import copy
import io

import pytest
import timm.layers
import torch

import senet
from senet import SEConfig, SqueezeExcite

SQUEEZES = ("avg", "max", "none")
GATES = ("sigmoid", "tanh", "relu", "hard_sigmoid")


def test_loads_timm_weights_and_gives_the_same_output():
    theirs = timm.layers.SEModule(64, rd_channels=4)
    ours = SqueezeExcite(64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 64, 9, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("spatial", [(7,), (5, 3), (1, 1), (2, 3, 4)])
def test_every_variant_keeps_shape_and_type_and_reaches_every_parameter(squeeze, gate, spatial):
    block = SqueezeExcite(12, SEConfig(reduction=2, squeeze=squeeze, gate=gate))
    with torch.no_grad():
        block.fc1.bias.uniform_(0.1, 0.5)
    x = torch.randn(1, 12, *spatial, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("gate", "function"),
    [
        ("sigmoid", lambda e: 1 / (1 + torch.exp(-e))),
        ("tanh", lambda e: (torch.exp(e) - torch.exp(-e)) / (torch.exp(e) + torch.exp(-e))),
        ("relu", lambda e: e.clamp(min=0)),
        ("hard_sigmoid", lambda e: (e / 6 + 0.5).clamp(0, 1)),
    ],
)
def test_gates_are_the_textbook_functions(gate, function):
    block = SqueezeExcite(6, SEConfig(reduction=1, gate=gate)).double()
    z = torch.randn(5, 6, dtype=torch.float64) * 4
    e = torch.relu(z @ block.fc1.weight.flatten(1).T) @ block.fc2.weight.flatten(1).T
    torch.testing.assert_close(block.excitation(z), function(e), rtol=1e-10, atol=1e-12)


def test_no_squeeze_is_two_1x1_convolutions_at_full_resolution():
    block = SqueezeExcite(8, SEConfig(reduction=2, squeeze="none"))
    x = torch.randn(2, 8, 4, 6)
    expected = x * torch.sigmoid(block.fc2(torch.relu(block.fc1(x))))
    torch.testing.assert_close(block(x), expected)
    assert block.gate(x).shape == x.shape


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_init_leaves_every_bit_and_still_learns(squeeze, gate, dtype):
    block = SqueezeExcite(16, SEConfig(reduction=4, squeeze=squeeze, gate=gate, identity_init=True)).to(dtype)
    x = torch.randn(2, 16, 5, 5).to(dtype)
    out = block(x)
    assert torch.equal(out, x)
    out.float().square().sum().backward()
    assert block.fc2.weight.grad.float().abs().sum() > 0


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_map_is_kept(layout, squeeze):
    block, x = SqueezeExcite(16, SEConfig(squeeze=squeeze)), torch.randn(2, 16, 5, 5).to(memory_format=layout)
    for of_weights in (torch.contiguous_format, torch.channels_last):
        assert block.to(memory_format=of_weights)(x).is_contiguous(memory_format=layout)


def test_what_compilers_capture():
    """The operations of the paper and nothing else, so that passes over graphs can know them."""
    kinds = []

    def keep(graph, inputs):
        calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
        kinds.extend(getattr(target, "__name__", target) for target in calls)
        return graph

    torch.compiler.reset()
    torch.compile(SqueezeExcite(16), backend=keep, fullgraph=True)(torch.randn(2, 16, 5, 5))
    assert kinds == ["mean", "conv2d", "relu", "conv2d", "sigmoid", "mul"]


def test_under_autocast_tables_stay_float32_and_the_map_keeps_its_type():
    block = SqueezeExcite(16)
    x = torch.randn(2, 16, 9, 9)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.gate(x).dtype == torch.float32
        half = block(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(block.gate(x.bfloat16()), block.gate(x), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("channels", "config", "width"),
    [
        (256, SEConfig(), 16),
        (64, SEConfig(), 4),
        (64, SEConfig(divisor=8), 8),
        (216, SEConfig(), 14),
        (8, SEConfig(), 1),
        (100, SEConfig(hidden=7), 7),
        (30, SEConfig(reduction=0.5), 60),
    ],
)
def test_hidden_width(channels, config, width):
    assert config.hidden_width(channels) == width
    assert SqueezeExcite(channels, config).fc1.out_channels == width


def test_hidden_width_rounds_as_timm_does():
    for channels in range(1, 600, 7):
        timms = timm.layers.make_divisible(channels / 16, 8, round_limit=0.0)
        assert SEConfig(divisor=8).hidden_width(channels) == timms


def test_without_bias_there_are_only_weights():
    assert [name for name, _ in SqueezeExcite(32, SEConfig(bias=False)).named_parameters()] == [
        "fc1.weight",
        "fc2.weight",
    ]


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("reduction", 0, "above 0"),
        ("reduction", float("nan"), "above 0"),
        ("reduction", "abc", "above 0"),
        ("squeeze", "mean", "'avg', 'max', 'none'"),
        ("gate", "softmax", "'sigmoid', 'tanh', 'relu', 'hard_sigmoid'"),
        ("gate", "identity_sigmoid", "'sigmoid', 'tanh', 'relu', 'hard_sigmoid'"),
        ("placement", "after", "'standard', 'pre', 'post', 'identity', '3x3'"),
        ("divisor", 0, "at least 1"),
        ("hidden", -3, "at least 1"),
        ("bias", "no", "True or False"),
        ("stages", 2, "stage numbers"),
        ("stages", (), "stage numbers"),
        ("identity_init", 1, "True or False"),
    ],
)
def test_invalid_values_name_argument_value_and_what_is_allowed(argument, value, allowed):
    with pytest.raises(ValueError, match=f"{argument}={value!r}".replace("(", r"\(").replace(")", r"\)")) as caught:
        SEConfig(**{argument: value})
    assert allowed in str(caught.value)


@pytest.mark.parametrize("channels", [0, -1, 2.5, True])
def test_invalid_channels(channels):
    with pytest.raises(ValueError, match=f"channels={channels}"):
        SqueezeExcite(channels)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"\(2, 8, 3, 3\).*\(N, 16"):
        SqueezeExcite(16)(torch.zeros(2, 8, 3, 3))


def test_config_round_trip():
    config = SEConfig(reduction=8, stages=[2, 3], gate="tanh")
    assert SEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no argument 'ratio'"):
        SEConfig.from_dict({"ratio": 8})


def test_copies_and_pickles_and_traces():
    block = SqueezeExcite(16, SEConfig(identity_init=True, gate="tanh"))
    x = torch.randn(2, 16, 3, 3)
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), block(x))
    assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))


def test_public_names():
    for name in senet.__all__:
        assert getattr(senet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SENet'"):
        _ = senet.SENet
