"""Norms as tables: from the moments of a map to its normalised form y = g·(u − centre) + offset.

Every norm made of the mean and variance of each channel of each image needs no look at the map itself. All here is
ordinary autograd on (N, C) tables, so that gradients through the statistics need no formula of their own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether the output depends on the statistics of this very map, not on running ones alone."""
    if isinstance(norm, _BatchNorm):
        return norm.training or norm.running_mean is None
    return True


def norm_tables(norm: Any, m: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(g, z) of a norm: the factor on u, (C,) or (N, C), and the squeeze of the normalised map, (N, C).

    The normalised map is g·(u − m) + z. Running statistics are updated in training mode, exactly as PyTorch does.

    Args:
        norm: one of ``NORMS``.
        m, v: mean and biased variance of each channel of each image, (N, C); ``v`` is not read with frozen statistics.
        size: S, positions of the map.

    Raises:
        ValueError: training-mode batch norm got a single value a channel.
    """
    if isinstance(norm, nn.GroupNorm):
        centre, variance = _group_statistics(m, v, norm.num_groups)
    elif uses_batch_statistics(norm):
        centre, variance = _batch_statistics(norm, m, v, size)
    else:
        centre, variance = norm.running_mean.to(m.dtype), norm.running_var.to(m.dtype)
    g = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.to(m.dtype)
    z = g * (m - centre)
    return g, z if norm.bias is None else z + norm.bias.to(m.dtype)


def _group_statistics(m: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels of each image, repeated for its channels, (N, C)."""
    per_group = m.unflatten(1, (groups, -1))
    centre = per_group.mean(2, keepdim=True)
    variance = (v.unflatten(1, (groups, -1)) + (per_group - centre).square()).mean(2, keepdim=True)
    return centre.expand_as(per_group).flatten(1), variance.expand_as(per_group).flatten(1)


def _batch_statistics(norm: Any, m: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the batch (over all ranks for SyncBatchNorm), (C,)."""
    count = m.shape[0] * size
    if gathers(norm):
        m, v, weights, total = _gathered(m, v, count, norm.process_group)
    else:
        weights, total = None, count
    if norm.training and total == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {(*m.shape, size)}")
    centre = _average(m, weights)
    variance = _average(v, weights) + _average((m - centre).square(), weights)
    if norm.training and norm.track_running_stats:
        _update_running(norm, centre.detach(), variance.detach(), total)
    return centre, variance


def _average(table: Tensor, weights: Tensor | None) -> Tensor:
    return table.mean(0) if weights is None else (weights * table).sum(0)


def _update_running(norm: Any, centre: Tensor, variance: Tensor, count: int) -> None:
    """PyTorch's rule: exponential with ``momentum``, cumulative with None; the running variance is the unbiased one."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    with torch.no_grad():
        weight: Any = norm.momentum
        if weight is None:
            weight = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        unbiased = variance * (count / (count - 1))
        norm.running_mean.lerp_(centre.to(norm.running_mean.dtype), weight)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)


def gathers(norm: nn.Module | None) -> bool:
    """Whether the norm asks other ranks for their statistics; then all of them must take the same form of it."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(norm.process_group) > 1


def _gathered(m: Tensor, v: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor, int]:
    """Each rank's statistics of the batch, as (ranks, C) tables, the ranks' shares of the pixels, and their number."""
    images = max(m.shape[0], 1)  # a rank may have none
    centre = m.sum(0) / images
    variance = (v + (m - centre).square()).sum(0) / images
    own = torch.cat([centre, variance, centre.new_tensor([count])])
    table = _AllGather.apply(own, group)
    counts = table[:, -1:].detach()
    channels = m.shape[1]
    return table[:, :channels], table[:, channels:-1], counts / counts.sum(), int(counts.sum())


class _AllGather(torch.autograd.Function):
    """The rows of all ranks; the gradient of a row is the sum of what all ranks' losses say of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, own, group=group)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
