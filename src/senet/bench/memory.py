"""Memory of a training step: bytes that autograd keeps for the backward pass, and the peak on a CUDA device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from senet.bench.candidates import CANDIDATES, Runner, Setting, Twins, precision
from senet.cost.memory import saved_storages
from senet.ops.dispatch import use_backend


def saved_for_backward(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes of distinct storages that a forward pass with cross-entropy keeps for backward, without parameters."""
    with saved_storages(model) as found:
        loss = F.cross_entropy(model(x), y)
    total = sum(kept.size for kept in found.values())
    del loss  # until here, the graph kept every storage alive, so no address was reused
    return total


def saved_mb_per_image(name: str, setting: Setting, twins: Twins, runner: Runner) -> float | None:
    """MB (10⁶ bytes) per image saved for backward; None for inference and compiled code."""
    candidate = CANDIDATES[name]
    if setting.mode != "train" or candidate.compiled or runner.model is None:
        return None
    with use_backend(candidate.backend), precision(setting):
        return saved_for_backward(runner.model, twins.x, twins.y) / len(twins.x) / 1e6


def peak_mb(name: str, setting: Setting, runner: Runner) -> float | None:
    """Peak MB of one step on CUDA, as if the candidate were alone: its own state plus what the step allocates.

    None for compiled inference, whose CUDA graphs own their memory, and on other devices.
    """
    hidden = setting.mode == "inference" and CANDIDATES[name].compiled
    if runner.model is None or hidden or setting.device != "cuda":
        return None
    runner.run()  # creates the optimizer's state and the gradients
    own = list(itertools.chain(runner.model.parameters(), runner.model.buffers()))
    own += [p.grad for p in runner.model.parameters() if p.grad is not None]
    if runner.optimizer is not None:
        own += [v for state in runner.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    state = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.run()
    torch.cuda.synchronize()
    return (state + torch.cuda.max_memory_allocated() - before) / 1e6
