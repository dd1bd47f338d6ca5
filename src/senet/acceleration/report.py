"""What the backend did to a network: one decision per gate or tail, as values."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["inference", "training"]


@dataclass(frozen=True)
class Decision:
    """How one gate or tail runs.

    Attributes:
        site: the path of the gate's module, or of the norm of a tail without a gate.
        mode: ``"inference"`` or ``"training"``.
        form: what runs: ``"early gate"``, ``"sweeps"``, … or ``"as captured"``.
        backend: who runs it: ``"native"``, ``"triton"``, ``"reference"``, …
        reason: why it is not faster; None for the fastest form.
    """

    site: str
    mode: Mode
    form: str
    backend: str
    reason: str | None = None

    def __str__(self) -> str:
        reason = "" if self.reason is None else f" ({self.reason})"
        return f"{self.form}, {self.backend}{reason}"


AS_CAPTURED = "as captured"


@dataclass
class Acceleration:
    """What was replaced and what was left unchanged, for everything that was captured so far.

    A network is captured at its first call in each mode; before that, there is nothing to report.

    Attributes:
        breaks: why the capture broke the network into several graphs, with the line of the source.
        graphs: the number of graphs so far, by mode.
        ordinary: why the network runs uncompiled, or None.
    """

    breaks: list[str] = field(default_factory=list)
    graphs: dict[Mode, int] = field(default_factory=dict)
    ordinary: str | None = None
    _decided: dict[tuple[Mode, str], Decision] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return Acceleration, ()  # copies of a network are captured anew

    def add(self, decision: Decision) -> None:
        """Take in a decision; it replaces an earlier one about the same site and mode."""
        self._decided[decision.mode, decision.site] = decision

    @property
    def decisions(self) -> list[Decision]:
        """One decision per site and mode; those of the last capture."""
        return list(self._decided.values())

    @property
    def inference(self) -> dict[str, str]:
        """Path of a gate → its form in eval mode, for those that were replaced."""
        return {d.site: d.form for d in self._of("inference") if d.form != AS_CAPTURED}

    @property
    def training(self) -> tuple[str, ...]:
        """The gates and norms that are computed in sweeps in training mode."""
        return tuple(d.site for d in self._of("training") if d.form != AS_CAPTURED)

    @property
    def left(self) -> dict[str, str]:
        """Path → why it is unchanged: gates, and other products of feature maps."""
        return {d.site: d.reason or "" for d in self.decisions if d.form == AS_CAPTURED}

    def _of(self, mode: Mode) -> Iterator[Decision]:
        return (decision for decision in self.decisions if decision.mode == mode)

    def __str__(self) -> str:
        if self.ordinary is not None:
            return f"not accelerated: {self.ordinary}"
        if not self.graphs:
            return "nothing is captured yet: call the network, or give accelerate an example_input"
        width = max((len(decision.site) for decision in self.decisions), default=0)
        lines = []
        for mode, count in self.graphs.items():
            of_mode = list(self._of(mode))
            replaced = sum(decision.form != AS_CAPTURED for decision in of_mode)
            lines.append(f"{mode}: {replaced} replaced, {len(of_mode) - replaced} unchanged, graphs: {count}")
            lines += [f"  {decision.site:{width}}  {decision}" for decision in of_mode]
        lines += [f"graph break: {reason}" for reason in self.breaks]
        return "\n".join(lines)
