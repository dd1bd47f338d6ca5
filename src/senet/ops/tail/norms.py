"""Norms as values, and on tables: from the moments of a feature map (a *map*) to its normalized form.

A norm that is a function of the mean and variance of each channel of each image does not need the map itself:
y = g·(u − center) + offset. Everything here is ordinary autograd on (N, C) tables, so gradients through the statistics
need no extra formulas.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm)


class BatchNorm(NamedTuple):
    """A batch norm as ``F.batch_norm`` takes it; calling it computes that. A named tuple can stand in a graph's node.

    ``training`` means that the statistics are those of the batch; then the running statistics, if there are any, are
    updated with ``momentum``. Counting batches is the caller's business. ``group`` is the process group of several
    ranks over which the statistics are gathered, or None; then only the tables below compute it.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: Any = None

    @property
    def frozen(self) -> bool:
        """Whether the result does not depend on the statistics of the map."""
        return not self.training

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize a map in one operation of PyTorch."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class GroupNorm(NamedTuple):
    """A group norm as ``F.group_norm`` takes it; calling it computes that."""

    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float

    @property
    def frozen(self) -> bool:
        """Whether the result does not depend on the statistics of the map."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize a map in one operation of PyTorch."""
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


Norm = BatchNorm | GroupNorm


def norm_of(module: Any) -> Norm:
    """The value of a module, one of ``NORMS``, for one forward pass: a batch norm that tracks statistics counts it."""
    if isinstance(module, nn.GroupNorm):
        return GroupNorm(module.weight, module.bias, module.num_groups, module.eps)
    momentum = module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(module.num_batches_tracked)
    tracked = not module.training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if tracked else (None, None)
    training = module.training or module.running_mean is None
    return BatchNorm(module.weight, module.bias, mean, var, training, momentum or 0.0, module.eps, group_of(module))


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether a norm module uses the statistics of its input, not only running statistics."""
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return True


def norm_tables(norm: Norm, m: Tensor, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(g, z) of a norm that uses the statistics of this map.

    g is the factor on u, (C,) or (N, C), and z the squeeze of the normalized map, (N, C). The normalized map is
    g·(u − m) + z. In training mode, running statistics are updated exactly as in PyTorch.

    Args:
        norm: the norm; not frozen.
        m, d, v: the result of ``definitions.moments``, (N, C). Means are compared with one another through d. z refers
            to m as rounded, so the normalized map is correct even if the mean is large relative to the deviation.
        pivot: the result of ``definitions.pivot``, (C,).
        size: S, the number of positions of the map.

    Raises:
        ValueError: batch norm in training mode got a single value per channel.
    """
    if isinstance(norm, GroupNorm):
        origin, center, variance = _group_statistics(d, v, pivot, norm.groups)
    else:
        origin, center, variance = _batch_statistics(norm, d, v, pivot, size)
    return _tables(norm, (m - origin) - center, variance)


def frozen_tables(norm: BatchNorm, m: Tensor) -> tuple[Tensor, Tensor]:
    """(g, z) as in ``norm_tables``, for batch norm with running statistics; m may be any (N, C) table."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return _tables(norm, m - norm.running_mean.to(m.dtype), norm.running_var.to(m.dtype))


def _tables(norm: Norm, from_center: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
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


def _batch_statistics(norm: BatchNorm, d: Tensor, v: Tensor, pivot: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Origin, mean, and variance of each channel over the batch (of all ranks), (C,) each."""
    count = d.shape[0] * size
    if gathers(norm):
        pivot, d, v, weights, total = _gathered(d, v, pivot, count, norm.group)
    else:
        weights, total = None, count
    if total == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {(*d.shape, size)}")
    center = _average(d, weights)
    variance = _average(v, weights) + _average((d - center).square(), weights)
    if norm.running_mean is not None:
        _update_running(norm, pivot + center.detach(), variance.detach(), total)
    return pivot, center, variance


def _average(table: Tensor, weights: Tensor | None) -> Tensor:
    return table.mean(0) if weights is None else (weights * table).sum(0)


def _update_running(norm: BatchNorm, center: Tensor, variance: Tensor, count: int) -> None:
    """Update as PyTorch does; the running variance is unbiased."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        unbiased = variance * (count / (count - 1))
        for running, new in ((norm.running_mean, center), (norm.running_var, unbiased)):
            # PyTorch does not count this write: another call of the same norm may have saved the tensor.
            values = running.data if type(running) is Tensor else running
            values.lerp_(new.to(running.dtype), norm.momentum)


def group_of(module: nn.Module | None) -> Any:
    """The process group over which a norm module gathers statistics now, or None."""
    if not isinstance(module, nn.SyncBatchNorm) or not module.training:
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(module.process_group) == 1:
        return None
    return dist.group.WORLD if module.process_group is None else module.process_group


def gathers(norm: Norm | None) -> bool:
    """Whether the norm gathers statistics from other ranks; then all ranks must use the same form of it."""
    return isinstance(norm, BatchNorm) and norm.group is not None


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
