"""The inference form of exported programs: the passes of ``torch.compile(…, backend="senet")`` on ATen operations."""

import copy
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from senet.acceleration.fold import fold
from senet.acceleration.gates import lift_gates
from senet.acceleration.operations import take_out_idle, without_private_writes
from senet.acceleration.report import AS_CAPTURED, Acceleration, Decision
from senet.errors import InputError
from senet.ops.conv import early_gate


def folded_program(
    program: torch.export.ExportedProgram, backend: str = "reference"
) -> tuple[fx.GraphModule, Acceleration]:
    """An exported program with its norms folded and its gates recognized, and what was decided for its gates.

    The forms are made from the current weights, which are copied; the program is not changed. Only what follows
    ``torch.export.export`` is read, not the graph after ``run_decompositions``.

    Args:
        program: a network that was exported in evaluation mode.
        backend: who computes what is replaced, as in ``accelerate``; ``"reference"`` can be exported again.

    Raises:
        InputError: the backend is unknown or not available.
    """
    if backend not in early_gate.BACKENDS:
        raise InputError(f"folded_program: backend={backend!r} is not one of {', '.join(early_gate.BACKENDS)}")
    work = copy.deepcopy(program.module())
    weight = next((p for p in work.parameters() if p.ndim > 1), None)
    reason = None if weight is None else early_gate.why_not(backend, weight)
    if reason is not None:
        raise InputError(f"folded_program: backend {backend!r} cannot run here: {reason}; use 'reference'")
    take_out_idle(work.graph)
    without_private_writes(work.graph)
    left = lift_gates(work.graph)
    folding = fold(work, backend)

    def value(node: Any) -> Any:
        return attrgetter(str(node.target))(work) if isinstance(node, fx.Node) else node

    with torch.no_grad():
        folding.make(value)
    work.graph.eliminate_dead_code(lambda node: node.op not in ("get_attr",))
    work.recompile()
    work.delete_all_unused_submodules()
    report = Acceleration(graphs={"inference": 1})
    for name, form in folding.forms.items():
        report.add(Decision(name, "inference", form, backend))
    for name, why in left.items():
        report.add(Decision(name, "inference", AS_CAPTURED, "torch", why))
    return work, report
