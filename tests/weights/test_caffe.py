"""Caffe's files: real messages of a network that a small Caffe in this file builds, runs and serialises.

Its layers do what Caffe documents, in float64; names and shapes are those of the authors' published prototxt files.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import senet
from helpers.messages import assert_said, one_line
from senet import SEConfig
from senet.models.resnet import Bottleneck, ResNet
from senet.weights.caffe import MAX_LAYERS, read_caffemodel
from senet.weights.load import load_pretrained

MESSAGES = {  # of caffe.proto: field → (number, type, repeated)
    "BlobShape": {"dim": (1, "INT64", True)},
    "BlobProto": {
        "num": (1, "INT32", False),
        "channels": (2, "INT32", False),
        "height": (3, "INT32", False),
        "width": (4, "INT32", False),
        "data": (5, "FLOAT", True),
        "diff": (6, "FLOAT", True),
        "shape": (7, "BlobShape", False),
        "double_data": (8, "DOUBLE", True),
    },
    "LayerParameter": {
        "name": (1, "STRING", False),
        "type": (2, "STRING", False),
        "bottom": (3, "STRING", True),
        "top": (4, "STRING", True),
        "blobs": (7, "BlobProto", True),
    },
    "V1LayerParameter": {"name": (4, "STRING", False), "blobs": (6, "BlobProto", True)},
    "NetParameter": {
        "name": (1, "STRING", False),
        "layers": (2, "V1LayerParameter", True),
        "layer": (100, "LayerParameter", True),
    },
}


@functools.cache
def net_parameter():
    """Caffe's message, declared in full: nested messages and packed numbers, unlike in the reader."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            own = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in MESSAGES:
                own.type, own.type_name = own.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                own.type = getattr(own, f"TYPE_{kind}")
                own.options.packed = repeated and kind != "STRING"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


class Caffe:
    """Runs layers and keeps them as messages; weights are drawn, the same for one seed."""

    def __init__(self):
        self.net = net_parameter()(name="random")
        self.generator = torch.Generator().manual_seed(4)

    def draw(self, *shape, low=-0.1, high=0.1):
        return torch.empty(shape).uniform_(low, high, generator=self.generator)

    def layer(self, name, kind, *blobs):
        message = self.net.layer.add(name=name, type=kind, bottom=["below"], top=[name])
        for blob in blobs:
            own = message.blobs.add(data=blob.flatten().tolist())
            own.shape.dim.extend(blob.shape)
        return [blob.double() for blob in blobs]

    def conv(self, name, x, channels, kernel=1, stride=1, bias=False, groups=1):
        inside = x.shape[1] // groups
        bound = (6 / (inside * kernel**2)) ** 0.5
        blobs = [self.draw(channels, inside, kernel, kernel, low=-bound, high=bound)]
        blobs += [self.draw(channels)] if bias else []
        return F.conv2d(x, *self.layer(name, "Convolution", *blobs), stride=stride, padding=kernel // 2, groups=groups)

    def unit(self, name, x, channels, kernel=1, stride=1, relu=True, groups=1):
        """Convolution, BatchNorm (sums and their weight), Scale and ReLU."""
        x = self.conv(name, x, channels, kernel, stride, groups=groups)
        factor = torch.tensor([999.98])
        mean, variance = self.draw(channels) * factor, self.draw(channels, low=0.5, high=1.5) * factor
        mean, variance, factor = self.layer(f"{name}/bn", "BatchNorm", mean, variance, factor)
        x = (x - _per_channel(mean / factor)) / (_per_channel(variance / factor) + 1e-5).sqrt()
        scale, shift = self.layer(
            f"{name}/bn/scale", "Scale", self.draw(channels, low=0.4, high=0.9), self.draw(channels)
        )
        x = x * _per_channel(scale) + _per_channel(shift)
        return x.relu() if relu else x

    def gate(self, name, x):
        """The authors' gate: global pooling, 1×1 convolutions with bias, Sigmoid."""
        self.layer(f"{name}_global_pool", "Pooling")
        z = self.conv(f"{name}_1x1_down", x.mean((2, 3), keepdim=True), x.shape[1] // 16, bias=True).relu()
        return x * self.conv(f"{name}_1x1_up", z, x.shape[1], bias=True).sigmoid()

    def classifier(self, x, classes):
        weight, bias = self.draw(classes, x.shape[1]), self.draw(classes)
        return F.linear(x.mean((2, 3)), *self.layer("classifier", "InnerProduct", weight, bias))


def _per_channel(table):
    return table[:, None, None]


def halving_pool(x):
    """Caffe's MAX pooling, kernel 3 and stride 2: no padding, and the last window may reach beyond the map."""
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


# 1×1, 3×3 (reduce, out), double 3×3 (reduce, out), pool projection; 0: none, and stride 2.
INCEPTION = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


def se_bn_inception(caffe, x, classes):
    x = halving_pool(caffe.unit("conv1/7x7_s2", x, 64, 7, 2))
    x = halving_pool(caffe.unit("conv2/3x3", caffe.unit("conv2/3x3_reduce", x, 64), 192, 3))
    for name, (one, reduce, three, double_reduce, double, projection) in INCEPTION.items():
        own = f"inception_{name}"
        stride = 1 if one else 2
        maps = [caffe.unit(f"{own}/1x1", x, one)] if one else []
        maps.append(caffe.unit(f"{own}/3x3", caffe.unit(f"{own}/3x3_reduce", x, reduce), three, 3, stride))
        h = caffe.unit(f"{own}/double3x3a", caffe.unit(f"{own}/double3x3_reduce", x, double_reduce), double, 3)
        maps.append(caffe.unit(f"{own}/double3x3b", h, double, 3, stride))
        if one:
            pooled = F.max_pool2d(x, 3, 1, 1) if name == "5b" else F.avg_pool2d(x, 3, 1, 1)
            maps.append(caffe.unit(f"{own}/pool_proj", pooled, projection))
        else:
            maps.append(halving_pool(x))
        x = caffe.gate(own, torch.cat(maps, 1))
    return caffe.classifier(x, classes)


def se_resnet(caffe, x, classes, blocks, groups=1, deep=False):
    """SE-ResNet (stride in the first 1×1); with 64 groups and a deep stem, SENet-154."""
    if deep:
        x = caffe.unit("conv1_1/3x3_s2", x, 64, 3, 2)
        x = caffe.unit("conv1_3/3x3", caffe.unit("conv1_2/3x3", x, 64, 3), 128, 3)
    else:
        x = caffe.unit("conv1/7x7_s2", x, 64, 7, 2)
    x = halving_pool(x)
    for stage, count in enumerate(blocks, 2):
        out = 2 ** (stage + 6)
        first, inside = (out // 2, out) if deep else (out // 4, out // 4)
        for block in range(1, count + 1):
            own, stride = f"conv{stage}_{block}", 2 if stage > 2 and block == 1 else 1
            shortcut = x
            at_3x3 = stride if deep else 1
            h = caffe.unit(f"{own}_1x1_reduce", x, first, 1, stride // at_3x3)
            h = caffe.unit(f"{own}_3x3", h, inside, 3, at_3x3, groups=groups)
            h = caffe.gate(own, caffe.unit(f"{own}_1x1_increase", h, out, relu=False))
            if block == 1:
                kernel = 3 if deep and stride == 2 else 1
                shortcut = caffe.unit(f"{own}_1x1_proj", x, out, kernel, stride, relu=False)
            x = (h + shortcut).relu()
    return caffe.classifier(x, classes)


SMALL = (1, 2, 1, 1)
FULL = pytest.param((3, 4, 6, 3), marks=pytest.mark.slow)


def run(network, size):
    """A message, images in RGB, and the logits of the network that the message holds."""
    caffe, rgb = Caffe(), torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = network(caffe, rgb.flip(1), 7)  # Caffe's images are BGR
    return caffe.net.SerializeToString(), rgb, expected


def assert_caffes_logits(path, ours, content, rgb, expected):
    path.write_bytes(content)
    load_pretrained(ours, path)
    with torch.no_grad():
        error = (ours.eval().double()(rgb) - expected).abs().max() / expected.abs().max()
    assert expected.std() > 1e-3, "all logits are alike: the comparison would prove nothing"
    assert error < 1e-6, f"relative difference {error:.2e}"


@pytest.fixture(scope="module")
def inception():
    return run(se_bn_inception, 64)


def test_se_bn_inception_gives_caffes_logits(tmp_path, inception):
    assert_caffes_logits(tmp_path / "net.caffemodel", senet.create_model("se_bn_inception", 7), *inception)


@pytest.mark.parametrize("blocks", [SMALL, FULL])
def test_se_resnet_gives_caffes_logits(tmp_path, blocks):
    ours = ResNet(Bottleneck, blocks, num_classes=7, se=SEConfig(), stride_in_1x1=True, ceil_pool=True)
    network = functools.partial(se_resnet, blocks=blocks)
    assert_caffes_logits(tmp_path / "net.caffemodel", ours, *run(network, 65))


@pytest.mark.slow
def test_senet154_of_fewer_blocks_gives_caffes_logits(tmp_path):
    how = {"groups": 64, "base_width": 4, "deep_stem": True, "down_kernel": 3, "first_width_divisor": 2}
    ours = ResNet(Bottleneck, SMALL, num_classes=7, se=SEConfig(), ceil_pool=True, **how)
    network = functools.partial(se_resnet, blocks=SMALL, groups=64, deep=True)
    assert_caffes_logits(tmp_path / "net.caffemodel", ours, *run(network, 65))


def small(**blob):
    """A network of one layer with one blob."""
    net = net_parameter()()
    own = net.layer.add(name="fc").blobs.add(**{key: value for key, value in blob.items() if key != "dim"})
    if "dim" in blob:
        own.shape.dim.extend(blob["dim"])
    return net.SerializeToString()


def test_blobs_of_every_form(tmp_path):
    path = tmp_path / "net.caffemodel"
    for blob, expected in (
        ({"data": [1, 2, 3, 4], "dim": [2, 2]}, torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        ({"double_data": [1, 2], "dim": [2]}, torch.tensor([1.0, 2.0])),
        ({"data": [1, 2], "diff": [5, 6], "dim": [2]}, torch.tensor([1.0, 2.0])),
        ({"data": [1, 2], "num": 1, "channels": 1, "height": 1, "width": 2}, torch.tensor([1.0, 2.0])),
        ({"data": [], "dim": [0]}, torch.zeros(0)),
    ):
        path.write_bytes(small(**blob))
        tensor = read_caffemodel(path)["fc.0"]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected)


def varint(number):
    content = b""
    while number > 127:
        content, number = content + bytes([number & 127 | 128]), number >> 7
    return content + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth):
    content = b""
    for _ in range(depth):
        content = field(100, content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no Caffe weights"),
        (b"name: 'a prototxt'", "net.caffemodel: … not a readable"),
        (small(data=[1.0] * 100, dim=[100])[:-7], "net.caffemodel: … not a readable"),
        (small(data=[1, 2, 3], dim=[2, 2]), "blob 'fc.0' … 3 numbers … (2, 2) … 4"),
        (small(data=[1], dim=[2**62, 2**62]), "1 numbers … shape"),
        (small(data=[1], dim=[-1]), "negative size"),
        (small(data=[1], dim=[1] * 1_000_000), "1,000,000 axes"),
        (small(data=[1]), "1 numbers … shape"),
        (field(100, b"") * (MAX_LAYERS + 1), "10,001 layers"),
        (field(100, field(7, b"") * 1_000_000), "1,000,000 blobs"),
        (field(100, field(1, b"a") + field(7, field(5, b"abc"))), "numbers … shape"),
        (field(100, field(1, b"\xff\n\xfe") + field(7, field(5, b"abcd"))), "net.caffemodel: … 1 numbers"),
        (field(2, field(4, b"old")), "before 2014"),
        (nested(5_000), "contains no Caffe weights"),
        (b"\x0b" * 100_000, "net.caffemodel: … not a readable"),  # groups in groups
    ],
)
def test_damaged_and_hostile_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    with pytest.raises(senet.InputError, match=one_line(message)) as caught:
        senet.load_weights(path)
    assert len(str(caught.value)) < 400


def test_two_layers_of_one_name_and_a_missing_protobuf(tmp_path, monkeypatch):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(small(data=[1], dim=[1]) * 2)
    with pytest.raises(senet.InputError, match=one_line("two layers … 'fc'")):
        senet.load_weights(path)
    monkeypatch.setitem(__import__("sys").modules, "google.protobuf.message", None)
    with pytest.raises(senet.InputError, match=one_line("pip install protobuf")):
        senet.load_weights(path)


def test_a_batch_norm_that_saw_nothing_has_no_division_by_zero(tmp_path, inception):
    net, path = net_parameter().FromString(inception[0]), tmp_path / "net.caffemodel"
    norm = next(layer for layer in net.layer if layer.name == "conv1/7x7_s2/bn")
    norm.blobs[2].data[0] = 0
    path.write_bytes(net.SerializeToString())
    model = senet.create_model("se_bn_inception", 7, pretrained=path)
    assert model.conv1.bn.running_var.eq(0).all()


def test_another_class_count_and_another_network(tmp_path, inception, caplog):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(inception[0])
    senet.create_model("se_bn_inception", 9, pretrained=path)
    assert_said(caplog.text, "number of classes … fc.weight, fc.bias")
    with pytest.raises(senet.InputError, match=r"40 unexpected \("):
        senet.create_model("bn_inception", 7, pretrained=path)
