"""Reads ``.caffemodel`` files, which are protobuf messages. Only names and blobs are used.

The message types are declared here with the field numbers of Caffe's ``caffe.proto``; undeclared fields are skipped.
Nested messages and packed floats are declared as bytes, which have the same wire format. Each layer is therefore
decoded separately, and numbers become tensors without one Python object per number.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senet.errors import InputError
from senet.text import first_line

MAX_LAYERS = 10_000  # the largest of the authors' networks has 1,100
MAX_BLOBS = 16  # per layer; a convolution has two, a batch norm three
MAX_AXES = 32  # Caffe's own limit
MAX_BYTES = 2**31  # protobuf's own limit

# Message: field → (number, type, repeated).
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "NetParameter": {"layers": (2, "BYTES", True), "layer": (100, "BYTES", True)},
    "LayerParameter": {"name": (1, "STRING", False), "blobs": (7, "BYTES", True)},
    "BlobProto": {
        **{name: (number, "INT32", False) for number, name in enumerate(("num", "channels", "height", "width"), 1)},
        "data": (5, "BYTES", False),
        "shape": (7, "BYTES", False),
        "double_data": (8, "BYTES", False),
    },
    "BlobShape": {"dim": (1, "INT64", True)},
}


@functools.cache
def _message(name: str) -> Any:
    """The class of a message type."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"senet/{name}.proto", package="senet.caffe", syntax="proto2")
    message = file.message_type.add(name=name)
    for field, (number, kind, repeated) in _FIELDS[name].items():
        message.field.add(
            name=field,
            number=number,
            type=f"TYPE_{kind}",
            label="LABEL_REPEATED" if repeated else "LABEL_OPTIONAL",
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"senet.caffe.{name}"))


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The blobs of a Caffe network by layer and index: ``conv1/7x7_s2.0`` is the first blob of that layer.

    Raises:
        InputError: protobuf is not installed, the file is damaged or not a Caffe file, or the size of a blob does not
            match its shape.
    """
    path = Path(path)
    try:
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: reading a Caffe file needs protobuf: pip install protobuf") from error
    try:
        return _blobs(path)
    # RuntimeError, UnicodeDecodeError: raised by some versions of protobuf for a name that is not valid text.
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        message = f"{path}: not a readable Caffe weight file ({first_line(error)}); download it again"
        raise InputError(message) from error


def _blobs(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size >= MAX_BYTES:
        raise InputError(f"{path}: is larger than 2 GiB, the maximum size of a Caffe file")
    net = _message("NetParameter").FromString(path.read_bytes())
    if net.layers and not net.layer:
        raise InputError(f"{path}: was written by Caffe before 2014; convert it with Caffe's upgrade_net_proto_binary")
    if len(net.layer) > MAX_LAYERS:
        raise InputError(f"{path}: has {len(net.layer):,} layers, the limit is {MAX_LAYERS:,}; download it again")
    blobs = {}
    for text in net.layer:
        layer = _message("LayerParameter").FromString(text)
        if len(layer.blobs) > MAX_BLOBS:
            raise InputError(f"{path}: layer {layer.name!r} has {len(layer.blobs):,} blobs, the limit is {MAX_BLOBS}")
        for index, content in enumerate(layer.blobs):
            key = f"{layer.name}.{index}"
            if key in blobs:
                raise InputError(f"{path}: two layers with weights are named {layer.name!r}")
            blobs[key] = _tensor(_message("BlobProto").FromString(content), f"{path}: blob {key!r}")
    if not blobs:
        raise InputError(f"{path}: contains no Caffe weights; use a .caffemodel, not a prototxt or solver state")
    return blobs


def _tensor(blob: Any, where: str) -> Tensor:
    if blob.HasField("shape"):
        shape = list(_message("BlobShape").FromString(blob.shape).dim)
    else:  # before 2015, Caffe blobs always had four axes, with ones in front
        shape = [blob.num, blob.channels, blob.height, blob.width]
        while len(shape) > 1 and shape[0] == 1:
            shape.pop(0)
    kind, content = (torch.float64, blob.double_data) if blob.double_data else (torch.float32, blob.data)
    if len(shape) > MAX_AXES or any(side < 0 for side in shape):
        raise InputError(f"{where} has a shape with {len(shape):,} axes, or a negative size; download the file again")
    held, wanted = len(content) / kind.itemsize, math.prod(shape)
    if held != wanted:
        raise InputError(f"{where} has {held:,g} numbers, but its shape {tuple(shape)} needs {wanted:,}")
    # frombuffer rejects an empty buffer, and warns about a read-only one
    flat = torch.frombuffer(bytearray(content), dtype=kind) if content else torch.zeros(0)
    return flat.float().reshape(shape)
