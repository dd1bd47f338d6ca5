"""Helpers that put another module in the place of one that has a gate: the gate is kept, or the next call raises."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import fuse_fx, prepare_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

import senet
from senet import SEConfig
from senet.nn.attachment import attached, described

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG = SEConfig(identity_init=True, hidden=4)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """Gates in a block, in a list (which is never called), and in the network itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norms = nn.ModuleList([nn.BatchNorm2d(8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norms[0](self.blocks(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


SITES = ["bn", "blocks.0.bn", "blocks.1.bn", "norms.0"]


def awake(model, sites="auto"):
    """Attach gates that are far from 1 to ``model``, in evaluation mode, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    for gate in senet.attach(model, CONFIG, sites, X).gates:
        nn.init.normal_(gate.fc2.bias)
    return model


@pytest.fixture
def net():
    return awake(Net(), SITES)


@pytest.fixture
def resnet():
    return awake(torchvision.models.resnet18(num_classes=5))


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        pass


def plain_norms(module):
    """What Lightning's ``TorchSyncBatchNorm.revert`` and mmengine's ``revert_sync_batchnorm`` do."""
    new = module
    if isinstance(module, nn.SyncBatchNorm):
        new = _AnyBatchNorm(module.num_features, module.eps, module.momentum)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
            setattr(new, name, getattr(module, name))
    for name, child in module.named_children():
        new.add_module(name, plain_norms(child))
    return new


def frozen_norms(module):
    """What converters to torchvision's ``FrozenBatchNorm2d`` do, which does not know how many channels it has."""
    new = module
    if isinstance(module, nn.BatchNorm2d):
        new = torchvision.ops.FrozenBatchNorm2d(module.num_features, module.eps)
        new.load_state_dict(module.state_dict(), strict=False)
    else:
        for name, child in module.named_children():
            setattr(module, name, frozen_norms(child))
    return new


def timm_freeze(model):
    timm.utils.freeze(model)
    return model


def synchronized_and_back(model):
    return plain_norms(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def frozen_and_thawed(model):
    return timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(model)).eval()


KEPT = {
    "timm.utils.freeze": timm_freeze,
    "timm, frozen and thawed": frozen_and_thawed,
    "frozen norms of torchvision": frozen_norms,
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "SyncBatchNorm and back": synchronized_and_back,
}


@pytest.mark.parametrize("convert", [pytest.param(f, id=name) for name, f in KEPT.items()])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_norms_that_take_the_place_of_norms_get_their_gates(net, convert, copied):
    with torch.no_grad():
        y = net(X)
        converted = convert(copied(net))
        keys = set(converted.state_dict())  # at once, so that an optimizer created now would know the gates
        assert {f"{site}.se.fc1.weight" for site in SITES} <= keys
        torch.testing.assert_close(converted(X), y)
        features = net.bn(net.conv(X))
        torch.testing.assert_close(converted.blocks[0](features), net.blocks[0](features))
    assert set(attached(converted)) == set(SITES)
    assert set(senet.detach(converted)) == set(SITES)
    assert_no_trace(converted)


def test_a_shared_norm_is_converted_in_each_place():
    model = Net()
    model.blocks[1].bn = model.blocks[0].bn
    model = awake(model, ["blocks.0.bn"])
    with torch.no_grad():
        y = model(X)
        torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(X), y)
        torch.testing.assert_close(timm_freeze(model)(X), y)


def fused(model):
    from torch.fx.experimental.optimization import fuse  # warns on import, in some versions of PyTorch

    return fuse(model)


def optimized_for_inference(model):
    from torch.fx.experimental.optimization import optimize_for_inference

    return optimize_for_inference(model, {"heuristic": lambda graph: False})


def quantization_prepared(model):
    return prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("fbgemm"), (X,))


TRACED = {
    "fuse": fused,
    "optimize_for_inference": optimized_for_inference,
    "fuse_fx": lambda m: fuse_fx(copy.deepcopy(m)),
    "prepare_fx": quantization_prepared,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.parametrize("convert", [pytest.param(f, id=name) for name, f in TRACED.items()])
@pytest.mark.parametrize("name", ["net", "resnet"])
def test_graphs_of_torch_fx_keep_the_gates(name, convert, request):
    model = request.getfixturevalue(name)
    with torch.no_grad():
        torch.testing.assert_close(convert(model)(X), model(X))


def test_a_feature_extractor_keeps_the_gates(resnet):
    with torch.no_grad():
        extractor = create_feature_extractor(resnet, {"layer2": "map"})
        body = nn.Sequential(*list(resnet.children())[:6])
        torch.testing.assert_close(extractor(X)["map"], body(X))
        torch.testing.assert_close(timm_freeze(extractor)(X)["map"], body(X))


def identities_for_norms(module, last=None):
    """What mmcv's ``fuse_conv_bn`` does: an ``nn.Identity`` takes the place of a norm, without a call of PyTorch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and last is not None:
            module._modules[last] = fuse_conv_bn_eval(module._modules[last], child)
            module._modules[name], last = nn.Identity(), None
        elif isinstance(child, nn.Conv2d):
            last = name
        else:
            identities_for_norms(child)


def norms_deleted(module):
    """What Ultralytics' ``fuse`` does: the norm is deleted, and the block gets another ``forward``."""
    for block in module.modules():
        if isinstance(block, Block):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            delattr(block, "bn")
            block.forward = lambda x, block=block: block.act(block.conv(x) + x)


def group_norms(module):
    for block in module.blocks:
        block.bn = nn.GroupNorm(2, 8)


LOST = {
    "mmcv fuse_conv_bn": identities_for_norms,
    "Ultralytics fuse": norms_deleted,
    "another kind of norm": group_norms,
}


@pytest.mark.parametrize("convert", [pytest.param(f, id=name) for name, f in LOST.items()])
@pytest.mark.parametrize("call", [lambda m: m(X), lambda m: m.blocks(torch.zeros(1, 8, 9, 9)), attached, described])
def test_a_lost_gate_is_named_at_the_next_call(net, convert, call):
    convert(net)
    with pytest.raises(senet.InputError, match=r"blocks\.0\.bn|'bn'") as raised:
        call(net)
    assert "senet.in_line" in str(raised.value)
    assert "\n" not in str(raised.value)
    senet.detach(net)  # accepts the loss
    assert_no_trace(net)
    net(X)


def test_a_lost_gate_is_named_within_lists_and_copies(net):
    net.norms[0] = nn.Identity()
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(senet.InputError, match=r"'norms\.0'.* replaced by Identity"):
            model(X)


class Iterated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


def test_a_lost_gate_is_named_where_a_container_is_iterated_over():
    model = awake(Iterated(), ["layers.1", "layers.2"])
    y = model(X)
    timm_freeze(model)
    torch.testing.assert_close(model(X), y)
    model.layers[2] = nn.LeakyReLU()
    for call in (model, model.layers):
        with pytest.raises(senet.InputError, match=r"layers\.2"):
            call(X)


def test_a_lost_gate_is_named_when_compiled(net):
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(X)
        net.blocks[1].bn = nn.Identity()
        with pytest.raises(senet.InputError, match=r"blocks\.1\.bn"):
            compiled(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_modules_does_not_fuse_a_gate_away(resnet):
    y = resnet(X)
    with pytest.raises(
        (NotImplementedError, AssertionError), match=r"BatchNorm2d' with an attached SE gate; .*senet\.in_line"
    ):
        fuse_modules(resnet.layer1[0], [["conv2", "bn2"]], inplace=True)
    fuse_modules(resnet.layer1[0], [["conv1", "bn1"]], inplace=True)  # has no gate
    torch.testing.assert_close(resnet(X), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_remedy_works(net):
    """In line, the convolutions and norms are fused, and the gates stay."""
    with torch.no_grad():
        y = net(X)
        twin = fused(senet.in_line(net))
        torch.testing.assert_close(twin(X), y)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in twin.modules()) == 1  # that of the list


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_a_carrier_that_is_wrapped_or_moved_keeps_its_gate(net):
    with torch.no_grad():
        y = net(X)
        net.blocks[0].bn = Wrapped(net.blocks[0].bn)
        net.norms.insert(0, nn.Identity())
        net.norms[0], net.norms[1] = net.norms[1], net.norms[0]
        torch.testing.assert_close(net(X), y)
        net.norms[0] = net.norms[1]
        with pytest.raises(senet.InputError, match=r"'norms\.0'"):
            net(X)


def test_parts_that_were_taken_elsewhere_are_watched(net):
    part = net.blocks[:1]
    outer = nn.Sequential(part[0].conv, part[0].bn)
    outer._modules["1"] = nn.Identity()
    with pytest.raises(senet.InputError, match=r"blocks\.0\.bn"):
        outer(torch.zeros(1, 8, 9, 9))


def test_classes(net):
    """``isinstance`` and names are as before; the exact class differs, because the module computes something else."""
    norm = net.bn
    assert isinstance(norm, nn.BatchNorm2d)
    assert type(norm) is not nn.BatchNorm2d
    assert type(norm) is type(net.norms[0]) is type(pickle.loads(pickle.dumps(norm)))
    assert repr(norm).startswith("BatchNorm2d(")
    senet.detach(net)
    assert_no_trace(net)


def test_a_class_that_others_put_on_top(net):
    """As FSDP does."""
    sharded = type("Sharded", (type(net.bn),), {})
    for module in net.modules():
        if type(module) is type(net.norms[0]):
            module.__class__ = sharded
    senet.detach(net)
    assert type(net.bn) is sharded
    assert sharded.__bases__ == (nn.BatchNorm2d,)
    assert "senet" not in repr(sharded)


@pytest.mark.parametrize("order", ["attach first", "norm first"])
@pytest.mark.parametrize("end", ["detach first", "norm first"])
def test_parametrizations_of_carriers(order, end):
    model, sites = Net(), ["blocks.0.conv"]
    if order == "attach first":
        awake(model, sites)
    nn.utils.parametrizations.weight_norm(model.blocks[0].conv)
    y = model(X) if order == "attach first" else awake(model, sites)(X)
    torch.testing.assert_close(copy.deepcopy(model)(X), y)
    if end == "detach first":
        assert senet.detach(model) == sites
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].conv, "weight")
    if end == "norm first":
        torch.testing.assert_close(model(X), y)
        assert senet.detach(model) == sites
    assert type(model.blocks[0].conv) is nn.Conv2d
    assert_no_trace(model)


def test_replicas_leave_the_network_as_it_is(net):
    """What DataParallel does on every call, here on one device."""
    replicas = {module: module._replicate_for_data_parallel() for module in net.modules()}
    for module, replica in replicas.items():
        replica._parameters = dict(module._parameters)
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
    torch.testing.assert_close(replicas[net](X), net(X))
    norm = net.blocks[0].bn
    assert all(norm is not replica for replica in replicas.values())
    senet.detach(norm)
    net(X)
    net.blocks[1].bn = nn.Identity()
    with pytest.raises(senet.InputError, match=r"blocks\.1\.bn"):
        net(X)


def test_one_graph(net):
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend)(X), net(X))
        program = torch.export.export(net, (X,)).module()
        torch.testing.assert_close(program(X), net(X))
        assert len(graphs) == 1
        converted = timm_freeze(copy.deepcopy(net))
        torch.testing.assert_close(torch.compile(converted, backend=backend)(X), net(X))
    assert len(graphs) == 2


def assert_no_trace(model):
    fresh = {path: vars(module).keys() for path, module in Net().named_modules()}
    for path, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not [name for name in vars(module) if name.startswith("_se")]
        assert type(module).__module__ != "senet.nn.carriers"
        if path in fresh and isinstance(module, (Net, Block)):
            assert vars(module).keys() - {"forward"} == fresh[path]
    norms = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms <= {nn.BatchNorm2d, nn.SyncBatchNorm, _AnyBatchNorm}
