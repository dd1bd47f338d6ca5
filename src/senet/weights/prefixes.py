"""Finds the part of a file that belongs to the network, by the keys that fit, under any prefix."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

from senet.errors import InputError
from senet.weights.files import is_averaged
from senet.weights.fit import COUNTER, grouped
from senet.weights.key_maps import recognize

_LOG = logging.getLogger("senet.weights")
# Components that wrappers add to keys, anywhere: DataParallel and AveragedModel, torch.compile, FSDP, Fabric, and
# activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
_DEEPEST = 8  # components of a prefix
_LEAST = 3  # at least 1/3 of the network's keys must fit; with fewer, it is a different network


def network_part(state: dict[str, Any], own: Collection[str], label: str) -> dict[str, Any]:
    """The entries of ``state`` that belong to the network, without prefixes and wrapper names.

    Components added by wrappers are removed. Then, the prefix with the most keys of the network is removed. Entries
    without this prefix (metrics, a criterion, a teacher) are ignored, with a warning.

    Args:
        state: the weights, with the key names of any layout.
        own: the keys of the network.
        label: the name of the file in messages.

    Raises:
        InputError: the file contains the network several times, and none of the copies is averaged.
    """
    state = _unwrapped(state, own)
    wanted = {key for key in own if not key.endswith(COUNTER)}
    counts = Counter(prefix for key in state for prefix in _prefixes(key))
    likely = [prefix for prefix, count in counts.items() if _LEAST * count >= len(wanted)]
    parts = {prefix: _below(state, prefix) for prefix in ["", *likely]}
    fitting = {prefix: _fitting(part, wanted) for prefix, part in parts.items()}
    most = max(fitting.values())
    if _LEAST * most < len(wanted):
        return state
    best = [prefix for prefix, count in fitting.items() if count == most]
    averaged = [prefix for prefix, count in fitting.items() if is_averaged(prefix) and 10 * count >= 9 * most]
    chosen = (averaged or best)[0]
    if len(averaged or best) > 1 and chosen:
        several = ", ".join(repr(prefix) for prefix in (averaged or best)[:6])
        raise InputError(f"{label}: contains several networks that fit, under {several}; save the one that you mean")
    if chosen:
        _warn(state, chosen, bool(averaged) and len(best) > (chosen in best), label)
    return parts[chosen]


def _warn(state: dict[str, Any], chosen: str, averaged: bool, label: str) -> None:
    rest = [key for key in state if not key.startswith(chosen)]
    if rest:
        what = "the averaged weights" if averaged else "the weights"
        _LOG.warning("%s: loaded %s under %r and ignored %s", label, what, chosen, grouped(rest))


def _unwrapped(state: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """``state`` without AveragedModel's counter and without wrapper names, unless the network itself uses them."""
    words = _WRAPPERS - {word for key in own for word in key.split(".")}
    kept = {key: value for key, value in state.items() if key.rpartition(".")[2] != "n_averaged" or key in own}
    bare = {".".join(word for word in key.split(".") if word not in words): value for key, value in kept.items()}
    return bare if len(bare) == len(kept) else kept


def _prefixes(key: str) -> list[str]:
    words = key.split(".", _DEEPEST)[:-1]
    return [".".join(words[: count + 1]) + "." for count in range(len(words))]


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _fitting(state: dict[str, Any], wanted: set[str]) -> int:
    """The number of keys of the network in ``state``, once renamed by its layout."""
    layout = recognize(state)
    return len(wanted & {layout.key(key) for key in state})
