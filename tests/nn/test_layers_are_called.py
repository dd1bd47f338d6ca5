"""The FCs of a gate are called, as in any other module: whatever they are changed to, and whoever listens, works."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import senet
from helpers.gates import hooked, in_a_sequence, low_rank, pruned, weight_normed
from helpers.messages import one_line
from senet import SEConfig, SqueezeExcite
from senet.models.resnet import BasicBlock

C = 16


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OwnConv2d(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


class Wrapped(torch.Tensor):
    """A tensor of another kind, as shards and quantized weights are."""


def weight_normed_by_hooks(se):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(se.fc1)
    with torch.no_grad():
        se.fc1.weight_g.mul_(2)


def spectral_normed(se):
    parametrizations.spectral_norm(se.fc1)


def parametrized(se):
    parametrize.register_parametrization(se.fc2, "weight", Doubled())


def subclass(se):
    own = OwnConv2d(se.fc1.in_channels, se.fc1.out_channels, 1)
    own.load_state_dict(se.fc1.state_dict())
    se.fc1 = own


def of_another_kind(se):
    se.fc2.weight = nn.Parameter(se.fc2.weight.detach().as_subclass(Wrapped))


def hooked_before(se):
    se.fc1.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def offloaded(se):
    """As HF accelerate does it: weights on the meta device, and another forward, which has them."""
    held = copy.deepcopy(se.fc1)
    se.fc1.to("meta")
    se.fc1.forward = lambda x: F.conv2d(x, held.weight, held.bias)


ODD = (
    *(pruned, weight_normed_by_hooks, weight_normed, spectral_normed, parametrized, low_rank, in_a_sequence),
    *(subclass, of_another_kind, hooked, hooked_before, offloaded),
)


def gate_of(change, seed=0):
    torch.manual_seed(seed)
    se = SqueezeExcite(C, SEConfig(reduction=2))
    nn.init.normal_(se.fc2.bias)
    change(se)
    return se


def as_called(se, x):
    """What the paper says, by calling the gate's layers."""
    z = x.mean((2, 3), keepdim=True)
    return x * torch.sigmoid(se.fc2(torch.relu(se.fc1(z))))


@pytest.fixture
def x():
    return torch.randn(4, C, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_their_fcs_are_called(change, x):
    se = gate_of(change).eval()
    torch.testing.assert_close(se(x), as_called(se, x))
    torch.testing.assert_close(x * se.gate(x)[:, :, None, None], as_called(se, x))


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__)
def test_their_fcs_are_called_within_a_block_and_get_gradients(change, x):
    block = BasicBlock(C, C, 1, 2, SEConfig(reduction=2), None).eval()
    block.se = se = gate_of(change).eval()
    h = torch.relu(block.bn1(block.conv1(x)))
    torch.testing.assert_close(got := block(x), torch.relu(as_called(se, block.bn2(block.conv2(h))) + x))
    got.sum().backward()
    weights = [p for p in se.parameters() if p.device.type == "cpu"]
    assert weights
    assert all(p.grad is not None for p in weights)


@pytest.mark.parametrize("change", [pruned, parametrized, low_rank, hooked], ids=lambda change: change.__name__)
def test_one_graph_with_the_same_result(change, x):
    se = gate_of(change).eval()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(se, backend="eager", fullgraph=True)(x), as_called(se, x))


def pruned_network(seed):
    torch.manual_seed(seed)
    network = senet.create_model("se_resnet8", num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.3)
    return network.eval()


def test_pruned_networks_train_and_load():
    a, b, images = pruned_network(1), pruned_network(2), torch.randn(4, 3, 32, 32)
    for _ in range(2):
        a.train()(images).sum().backward()
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b(images), a.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("change", [weight_normed_by_hooks, weight_normed, spectral_normed, parametrized])
def test_parameters_behind_a_weight_count_at_every_call(change, x):
    se = gate_of(change).eval()
    before = se(x)
    with torch.no_grad():
        for name, p in se.named_parameters():
            if name.startswith(("fc1", "fc2")) and "bias" not in name:
                p.mul_(torch.linspace(1, 3, p.shape[0]).view(-1, *(1,) * (p.ndim - 1)))
    assert not torch.allclose(se(x), before, rtol=1e-2)


def test_adapters_learn(x):
    se = gate_of(low_rank)
    se(x).square().sum().backward()
    assert se.fc1.a.weight.grad.abs().max() > 0


def test_every_kind_of_listener_hears_the_fcs(x):
    se, heard = SqueezeExcite(C), []
    own = [
        se.fc1.register_full_backward_hook(lambda *args: heard.append("backward")),
        se.fc2.register_full_backward_pre_hook(lambda *args: heard.append("before backward")),
    ]
    everywhere = [
        register_module_forward_hook(lambda module, args, out: heard.append(type(module).__name__)),
        register_module_forward_pre_hook(lambda module, args: heard.append(type(module).__name__)),
    ]
    try:
        y = se(x.requires_grad_())
    finally:
        for hook in everywhere:
            hook.remove()
    y.sum().backward()
    assert heard.count("Conv2d") == 4
    assert heard.count("ReLU") == 2
    assert {"backward", "before backward"} <= set(heard)
    heard.clear()
    for hook in own:
        hook.remove()
    se(x)
    assert heard == []


def test_half_types_are_computed_in_the_layers_own(x):
    se, types = gate_of(hooked).to(torch.bfloat16), []
    se.fc1.register_forward_pre_hook(lambda layer, args: types.append(args[0].dtype))
    y = se(x.to(torch.bfloat16))
    assert y.dtype == types[0] == torch.bfloat16
    torch.testing.assert_close(y.float(), gate_of(hooked)(x), rtol=0.05, atol=0.05)


def test_under_autocast_tables_stay_float32(x):
    se, types = gate_of(hooked), []
    se.fc2.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        se(x)
    assert types == [torch.float32]


@pytest.mark.parametrize("shape", [(2, C, 7), (2, C, 5, 4), (2, C, 2, 3, 4)])
@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_maps_of_any_axes(shape, squeeze):
    torch.manual_seed(0)
    se, y = SqueezeExcite(C, SEConfig(squeeze=squeeze)), torch.randn(shape)
    expected = se(y)
    se.fc1.register_forward_hook(lambda *args: None)  # changes nothing
    torch.testing.assert_close(se(y), expected)
    with pytest.raises(ValueError, match=one_line("one, two, or three")):
        se(y[:, 1:])


def test_layers_of_another_geometry_are_called(x):
    se = SqueezeExcite(C, SEConfig(reduction=1))
    se.fc1 = nn.Conv2d(C, C, 3, padding=1, groups=C)
    torch.testing.assert_close(se(x), as_called(se, x))


def test_linear_layers_take_the_same_weights(x):
    se, same = gate_of(lambda se: None), gate_of(lambda se: None)
    for name in ("fc1", "fc2"):
        layer = getattr(se, name)
        linear = nn.Linear(layer.in_channels, layer.out_channels)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.flatten(1))
            linear.bias.copy_(layer.bias)
        setattr(same, name, linear)
    torch.testing.assert_close(same(x), se(x))


def test_other_parameters_for_one_call(x):
    se = SqueezeExcite(C)
    other = {name: p.detach() * 2 for name, p in se.named_parameters()}
    twin = SqueezeExcite(C)
    twin.load_state_dict(other)
    torch.testing.assert_close(torch.func.functional_call(se, other, (x,)), twin(x))
    stacked = {name: torch.stack([p.detach(), other[name]]) for name, p in se.named_parameters()}
    both = torch.func.vmap(lambda weights: torch.func.functional_call(se, weights, (x,)))(stacked)
    torch.testing.assert_close(both, torch.stack([se(x), twin(x)]))


@pytest.mark.parametrize("module", [lambda se: se, lambda se: nn.Sequential(se)], ids=["alone", "in a network"])
def test_flops_are_counted_by_module(module, x):
    network = module(SqueezeExcite(C, SEConfig(reduction=2)))
    with FlopCounterMode(display=False) as counter:
        network(x)
    counts = counter.get_flop_counts()
    of_layers = [sum(flops.values()) for name, flops in counts.items() if name.endswith(("fc1", "fc2"))]
    assert of_layers == [2 * len(x) * C * C // 2] * 2


def test_a_hook_may_offload_and_bring_back(x):
    """As libraries do it that keep weights elsewhere between calls."""
    se, expected = gate_of(lambda se: None), gate_of(lambda se: None)(x)
    held = {}

    def bring(layer, args):
        layer.weight.data, layer.bias.data = held[layer]

    def put_away(layer, *args):
        held[layer] = layer.weight.data, layer.bias.data
        layer.weight.data, layer.bias.data = (torch.empty(0) for _ in range(2))

    for layer in (se.fc1, se.fc2):
        put_away(layer)
        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(put_away)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(se(x), expected)


@pytest.mark.filterwarnings("ignore")  # PyTorch is about to move its quantization
def test_quantization_aware_training_sees_the_fcs(x):
    aq = pytest.importorskip("torch.ao.quantization")
    net = nn.Sequential(SqueezeExcite(C)).train()
    net.qconfig = aq.get_default_qat_qconfig("fbgemm")
    aq.prepare_qat(net, inplace=True)
    net(x).sum().backward()
    for fc in (net[0].fc1, net[0].fc2):
        assert fc.weight_fake_quant.activation_post_process.max_val.isfinite().all()  # infinite until it is called
        assert fc.activation_post_process.activation_post_process.max_val.isfinite()


def test_torch_fx_sees_calls(x):
    se = gate_of(low_rank).eval()
    graph = torch.fx.symbolic_trace(se)
    torch.testing.assert_close(graph(x), se(x))


SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import senet
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
torch.manual_seed(0)
net = senet.create_model("se_resnet8", num_classes=10)
twin = senet.create_model("se_resnet8", num_classes=10)
twin.load_state_dict(net.state_dict())
for module in reversed(list(net.modules())):
    if ({whole} and any(True for _ in module.parameters())) or isinstance(module, nn.Conv2d):
        fully_shard(module, mesh=mesh)
x = torch.randn(4, 3, 32, 32)
losses = []
for each in (net, twin):
    optimizer = torch.optim.SGD(each.parameters(), 0.1)
    for _ in range(2):
        loss = each(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(loss.item())
dist.destroy_process_group()
print(*losses)
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch cannot distribute")
@pytest.mark.parametrize("whole", [False, True], ids=["convolutions", "every module"])
def test_sharded_layers_train(whole, tmp_path):
    code = SHARDED.format(file=tmp_path / "store", whole=whole)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    sharded, ordinary = map(float, done.stdout.split())
    assert sharded == pytest.approx(ordinary, rel=1e-4)
