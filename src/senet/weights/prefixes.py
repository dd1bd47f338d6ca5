"""Which part of a file is the network: found by the keys that fit it, under whatever names wrappers put before them."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

from senet.errors import InputError
from senet.weights.files import is_averaged
from senet.weights.fit import COUNTER, grouped
from senet.weights.key_maps import recognise

_LOG = logging.getLogger("senet.weights")
# Words that wrappers put into keys, in front or in the middle: DataParallel and AveragedModel, torch.compile, FSDP,
# Fabric, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
_DEEPEST = 8  # words of a prefix
_LEAST = 3  # a part of this share of the network's keys, 1/3, is the network; less is another


def network_part(state: dict[str, Any], own: Collection[str], label: str) -> dict[str, Any]:
    """The entries of ``state`` that are the network's, without what stands before or between its names.

    Wrappers' words are taken out. Then the prefix is taken off under which most keys are the network's, whatever it
    is; what is not under it (metrics, a criterion, a teacher) is left, with a warning.

    Args:
        state: under the names of any layout.
        own: the network's keys.
        label: what messages call the file.

    Raises:
        InputError: the network is in the file several times, and none of them is averaged.
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
        raise InputError(f"{label}: holds several networks that fit, under {several}; save the one that you mean")
    if chosen:
        _tell(state, chosen, bool(averaged) and len(best) > (chosen in best), label)
    return parts[chosen]


def _tell(state: dict[str, Any], chosen: str, averaged: bool, label: str) -> None:
    rest = [key for key in state if not key.startswith(chosen)]
    if rest:
        what = "the averaged weights" if averaged else "the weights"
        _LOG.warning("%s: took %s under %r and left %s", label, what, chosen, grouped(rest))


def _unwrapped(state: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Without wrappers' words, unless the network has such a part itself; without AveragedModel's counter."""
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
    """How many of the network's keys are there, under the names of their layout."""
    layout = recognise(state)
    return len(wanted & {layout.key(key) for key in state})
