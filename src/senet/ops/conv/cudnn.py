"""Convolutions of cuDNN that take in what follows them, at inference on a GPU.

PyTorch adds the bias of a convolution in a pass of its own over the map, and the ReLU in another: measured on an H200,
4.9 ms of the 12.4 of SE-ResNet-50 with its norms folded (256 images, bfloat16). cuDNN does both as it writes the map.
"""

import torch
from torch import Tensor


def why_not(weight: Tensor) -> str | None:
    """Why cuDNN cannot run a convolution with this weight; None if it can."""
    if weight.device.type != "cuda":
        return "the network is not on a CUDA device"
    if torch.version.hip is not None:
        return "cuDNN is NVIDIA's"
    if not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_acceptable(weight):
        return "PyTorch has no cuDNN, or it is switched off"
    if weight.dtype == torch.float64:
        return "float64 has no fused form"
    return None


def convolution_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    shortcut: Tensor | None = None,
) -> Tensor:
    """relu(convolution(x) + bias + shortcut), a new map; ``shortcut`` has its shape, type and memory format.

    Raises:
        RuntimeError: cuDNN has no such kernel.
    """
    geometry = (bias, stride, padding, dilation, groups)
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, *geometry)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """convolution(x) + bias, a new map; the bias is added by a kernel that moves 16 bytes at once."""
    from senet.ops.tail import triton as triton_kernels  # here, as Triton is heavy

    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    return triton_kernels.elementwise(y, None, torch.ones_like(bias), bias, None, None)
