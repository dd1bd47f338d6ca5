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


def norm_tables(norm: Any, m: Tensor, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(g, z) of a norm that takes its statistics from this map.

    g is the factor on u, (C,) or (N, C), and z the squeeze of the normalised map, (N, C); the normalised map is
    g·(u − m) + z. Running statistics are updated in training mode, exactly as PyTorch does.

    Args:
        norm: one of ``NORMS``.
        m, d, v: of ``sweeps.moments``, (N, C). Means are compared with one another as d; z belongs to m as it was
            rounded, so that the normalised map is right where the mean is large beside the deviation.
        pivot: of ``sweeps.pivot``, (C,).
        size: S, positions of the map.

    Raises:
        ValueError: training-mode batch norm got a single value a channel.
    """
    if isinstance(norm, nn.GroupNorm):
        origin, centre, variance = _group_statistics(d, v, pivot, norm.num_groups)
    else:
        origin, centre, variance = _batch_statistics(norm, d, v, pivot, size)
    return _tables(norm, (m - origin) - centre, variance)


def frozen_tables(norm: Any, m: Tensor) -> tuple[Tensor, Tensor]:
    """(g, z) as of ``norm_tables`` for batch norm with running statistics; m may be any table, (N, C)."""
    return _tables(norm, m - norm.running_mean.to(m.dtype), norm.running_var.to(m.dtype))


def _tables(norm: Any, from_centre: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        g = g * norm.weight.to(g.dtype)
    z = g * from_centre
    return g, z if norm.bias is None else z + norm.bias.to(g.dtype)


def _group_statistics(d: Tensor, v: Tensor, pivot: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where means are measured from, mean and variance of each group of channels of each image; for each channel."""
    origin = pivot.unflatten(0, (groups, -1))[:, :1].expand(-1, len(pivot) // groups).flatten()
    per_group = (d + (pivot - origin)).unflatten(1, (groups, -1))
    centre = per_group.mean(2, keepdim=True)
    variance = (v.unflatten(1, (groups, -1)) + (per_group - centre).square()).mean(2, keepdim=True)
    return origin, centre.expand_as(per_group).flatten(1), variance.expand_as(per_group).flatten(1)


def _batch_statistics(norm: Any, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where means are measured from, mean and variance of each channel over the batch (over all ranks), (C,) each."""
    count = d.shape[0] * size
    if gathers(norm):
        pivot, d, v, weights, total = _gathered(d, v, pivot, count, norm.process_group)
    else:
        weights, total = None, count
    if norm.training and total == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {(*d.shape, size)}")
    centre = _average(d, weights)
    variance = _average(v, weights) + _average((d - centre).square(), weights)
    if norm.training and norm.track_running_stats:
        _update_running(norm, pivot + centre.detach(), variance.detach(), total)
    return pivot, centre, variance


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


def _gathered(
    d: Tensor, v: Tensor, pivot: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """One pivot for all ranks, each rank's statistics as (ranks, C) tables, their shares of the pixels, the number."""
    images = max(d.shape[0], 1)  # a rank may have none
    centre = d.sum(0) / images
    variance = (v + (d - centre).square()).sum(0) / images
    own = torch.cat([centre, variance, pivot, centre.new_tensor([count])])
    table = _AllGather.apply(own, group)
    channels, counts = d.shape[1], table[:, -1:].detach()
    pivots = table[:, 2 * channels : -1].detach()
    chosen = pivots[counts.argmax()]  # of a rank that has images
    from_chosen = table[:, :channels] + (pivots - chosen)
    return chosen, from_chosen, table[:, channels : 2 * channels], counts / counts.sum(), int(counts.sum())


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
