"""The processes of a run: checks whether the launcher variables in the environment belong to this run."""

from __future__ import annotations

import os
from typing import Any

from senet.errors import InputError

# launcher → a variable that only it sets, and the variable with the number of processes that it started
_LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),  # salloc and sbatch set only SLURM_NTASKS
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_SIZE"),
}
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# Lightning sets these in the processes that it starts itself, and reads them if it knows no launcher.
_LIGHTNINGS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def is_first_process() -> bool:
    """Whether this process writes files and prints. The others only compute."""
    from lightning.fabric.utilities import rank_zero

    machine = _number("NODE_RANK") or _number("GROUP_RANK")
    return getattr(rank_zero.rank_zero_only, "rank", 0) == 0 and machine == 0


def check_processes(devices: int, num_nodes: int) -> None:
    """Reject an environment for a different number of processes, in which some would compute and none would write.

    Call it before importing Lightning, which fails on a rank that is not a number.
    """
    wanted = devices * num_nodes
    ranks = {name: _number(name) for name in _RANKS}
    launcher, started = _launcher()
    if launcher is not None:
        if started != wanted:
            raise InputError(
                f"{launcher} started {started} processes, but --devices {devices} and --num-nodes {num_nodes} "
                f"make {wanted}; use the same numbers as for {launcher}"
            )
        return
    places = {name: os.environ[name] for name, rank in ranks.items() if rank}
    if wanted > 1 and ("LOCAL_RANK" in os.environ or set(places) <= set(_LIGHTNINGS)):
        return
    if wanted == 1 and _number("WORLD_SIZE") > 1:
        places["WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    if places:
        found = ", ".join(f"{name}={value}" for name, value in places.items())
        raise InputError(
            f"{found} in the environment, but no launcher started several processes; unset {' '.join(places)}, "
            "or start with torchrun and give --devices and --num-nodes"
        )


def environment_plugins(devices: int, num_nodes: int) -> list[Any]:
    """Plugins that keep Lightning from mistaking leftover variables for a launcher."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    if _launcher()[0] is None and (devices * num_nodes == 1 or "SLURM_NTASKS" in os.environ):
        return [LightningEnvironment()]
    return []


def _launcher() -> tuple[str | None, int]:
    """The launcher that started this process, and how many processes it started."""
    for name, (sign, count) in _LAUNCHERS.items():
        started = _number(count)
        if sign in os.environ and (started > 1 or name == "torchrun"):
            return name, started
    return None, 1


def _number(name: str) -> int:
    """The number in a variable, or 0 if it is not set. Raises InputError if it is not a number."""
    text = os.environ.get(name) or "0"
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text!r} in the environment is not a number; unset {name}") from None
