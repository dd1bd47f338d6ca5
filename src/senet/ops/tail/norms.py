"""Norms on tables: from the moments of a feature map (a *map*) to its normalized form y = g·(u − center) + offset.

A norm that is a function of the mean and variance of each channel of each image does not need the map itself.
Everything here is ordinary autograd on (N, C) tables, so gradients through the statistics need no extra formulas.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether the norm uses the statistics of its input, not only running statistics."""
    if isinstance(norm, _BatchNorm):
        return norm.training or norm.running_mean is None
    return True


def norm_tables(norm: Any, m: Tensor, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(g, z) of a norm that uses the statistics of this map.

    g is the factor on u, (C,) or (N, C), and z the squeeze of the normalized map, (N, C). The normalized map is
    g·(u − m) + z. In training mode, running statistics are updated exactly as in PyTorch.

    Args:
        norm: one of ``NORMS``.
        m, d, v: the result of ``definitions.moments``, (N, C). Means are compared with one another through d. z refers
            to m as rounded, so the normalized map is correct even if the mean is large relative to the deviation.
        pivot: the result of ``definitions.pivot``, (C,).
        size: S, the number of positions of the map.

    Raises:
        ValueError: batch norm in training mode got a single value per channel.
    """
    if isinstance(norm, nn.GroupNorm):
        origin, center, variance = _group_statistics(d, v, pivot, norm.num_groups)
    else:
        origin, center, variance = _batch_statistics(norm, d, v, pivot, size)
    return _tables(norm, (m - origin) - center, variance)


def frozen_tables(norm: Any, m: Tensor) -> tuple[Tensor, Tensor]:
    """(g, z) as in ``norm_tables``, for batch norm with running statistics; m may be any (N, C) table."""
    return _tables(norm, m - norm.running_mean.to(m.dtype), norm.running_var.to(m.dtype))


def _tables(norm: Any, from_center: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.to(g.dtype)
    z = g * from_center
    return g, z if norm.bias is None else z + norm.bias.to(g.dtype)


def _group_statistics(d: Tensor, v: Tensor, pivot: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origin, mean, and variance of each group of channels of each image, repeated for each channel of the group."""
    origin = pivot.unflatten(0, (groups, -1))[:, :1].expand(-1, len(pivot) // groups).flatten()
    per_group = (d + (pivot - origin)).unflatten(1, (groups, -1))
    center = per_group.mean(2, keepdim=True)
    variance = (v.unflatten(1, (groups, -1)) + (per_group - center).square()).mean(2, keepdim=True)
    return origin, center.expand_as(per_group).flatten(1), variance.expand_as(per_group).flatten(1)


def _batch_statistics(norm: Any, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origin, mean, and variance of each channel over the batch (of all ranks), (C,) each."""
    count = d.shape[0] * size
    if gathers(norm):
        pivot, d, v, weights, total = _gathered(d, v, pivot, count, norm.process_group)
    else:
        weights, total = None, count
    if norm.training and total == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {(*d.shape, size)}")
    center = _average(d, weights)
    variance = _average(v, weights) + _average((d - center).square(), weights)
    if norm.training and norm.track_running_stats:
        _update_running(norm, pivot + center.detach(), variance.detach(), total)
    return pivot, center, variance


def _average(table: Tensor, weights: Tensor | None) -> Tensor:
    return table.mean(0) if weights is None else (weights * table).sum(0)


def _update_running(norm: Any, center: Tensor, variance: Tensor, count: int) -> None:
    """Update as PyTorch does: exponential with ``momentum``, cumulative with None; the running variance is unbiased."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    with torch.no_grad():
        weight: Any = norm.momentum
        if weight is None:
            weight = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
        unbiased = variance * (count / (count - 1))
        norm.running_mean.lerp_(center.to(norm.running_mean.dtype), weight)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)


def gathers(norm: nn.Module | None) -> bool:
    """Whether the norm gathers statistics from other ranks; then all ranks must use the same form of it."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(norm.process_group) > 1


def _gathered(
    d: Tensor, v: Tensor, pivot: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """A common pivot, (ranks, C) means and variances, each rank's fraction of the positions, and their total."""
    images = max(d.shape[0], 1)  # a rank may have none
    center = d.sum(0) / images
    variance = (v + (d - center).square()).sum(0) / images
    own = torch.cat([center, variance, pivot, center.new_tensor([count])])
    table = _AllGather.apply(own, group)
    channels, counts = d.shape[1], table[:, -1:].detach()
    pivots = table[:, 2 * channels : -1].detach()
    chosen = pivots[counts.argmax()]  # from a rank that has images
    from_chosen = table[:, :channels] + (pivots - chosen)
    return chosen, from_chosen, table[:, channels : 2 * channels], counts / counts.sum(), int(counts.sum())


class _AllGather(torch.autograd.Function):
    """The rows of all ranks; the gradient of a row is the sum of its gradients over all ranks' losses."""

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
