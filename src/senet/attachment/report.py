"""The report of ``senet.attach``: a table of the sites, and an optimizer group for training."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from senet.attachment.site import Site
from senet.attachment.sites import Search
from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.system.text_table import text_table

# New gates start slowly: while the last FC is zero, only its own gradient is nonzero. Like a new classifier, they can
# take larger steps than the pretrained network.
LR_MULTIPLIER = 10.0
COLUMNS = ("site", "kind", "stage", "channels", "map", "parameters", "multiply-adds")


@dataclass(frozen=True)
class AttachReport:
    """Sites, costs, and new parameters of a call of ``senet.attach``.

    Attributes:
        model: the class name of the network.
        config: the configuration of the gates.
        search: the sites, the skipped places with reasons, and the cost of the network itself.
        gates: the SE blocks, in the order of ``sites``; empty after a dry run.
        own: the parameters of the network, without gates.
    """

    model: str
    config: SEConfig
    search: Search = field(repr=False)
    gates: tuple[SqueezeExcite, ...] = field(repr=False)
    own: tuple[nn.Parameter, ...] = field(repr=False)

    @property
    def sites(self) -> list[Site]:
        """The sites, in execution order."""
        return self.search.sites

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(place, reason) for each place without a gate."""
        return self.search.skipped

    @property
    def added_parameters(self) -> int:
        """The number of parameters that the gates add."""
        return sum(site.parameters for site in self.sites)

    @property
    def added_mult_adds(self) -> int:
        """The multiply-adds that the gates' FCs add for one image."""
        return sum(site.mult_adds for site in self.sites)

    @property
    def own_parameters(self) -> int:
        """The number of parameters of the network, without gates."""
        return sum(parameter.numel() for parameter in self.own)

    def parameters(self, lr: float | None = None) -> dict[str, Any]:
        """The new parameters as a parameter group for any ``torch.optim`` optimizer.

        Args:
            lr: the learning rate of the network; the group gets ``LR_MULTIPLIER`` times as much. With None, the group
                has ``lr_scale`` instead, a factor that timm's schedulers apply.

        Raises:
            InputError: nothing was attached, because of a dry run.
        """
        if not self.gates:
            raise InputError("attach: a dry run has no new parameters; attach without dry_run=True")
        new = [parameter for gate in self.gates for parameter in gate.parameters()]
        return {"params": new, **({"lr_scale": LR_MULTIPLIER} if lr is None else {"lr": lr * LR_MULTIPLIER})}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The network's own parameters at ``lr``, and the gates' at ``LR_MULTIPLIER`` times that."""
        return [{"params": list(self.own), "lr": lr}, self.parameters(lr)]

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, in the order of ``COLUMNS``."""
        return [
            (
                site.name,
                site.kind if site.placement == "standard" else f"{site.kind}, {site.placement}",
                str(site.stage),
                str(site.channels),
                "×".join(map(str, site.map_size)) or "—",
                f"{site.parameters:,}",
                f"{site.mult_adds:,}",
            )
            for site in self.sites
        ]

    def summary(self) -> str:
        """The totals and the skipped places, in a few lines."""
        word = "attached to" if self.gates else "would be attached to"
        blocks = "1 SE block" if len(self.sites) == 1 else f"{len(self.sites)} SE blocks"
        share = f" (+{100 * self.added_parameters / self.own_parameters:.2f} %)" if self.own_parameters else ""
        lines = [f"{blocks} {word} {self.model}: {self.added_parameters:,} parameters{share}"]
        if self.search.mult_adds:
            own = self.search.mult_adds / self.search.images
            share = f"(+{100 * self.added_mult_adds / own:.3f} %)"
            lines[0] += f", {self.added_mult_adds:,} multiply-adds per image {share}"
        if self.search.fallback is not None:
            lines.append(f"no block has a place that can hold a gate, so the gates go {self.search.fallback}")
        reasons: dict[str, list[str]] = {}
        for place, reason in self.skipped:
            reasons.setdefault(reason, []).append(place)
        for reason, places in reasons.items():
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            lines.append(f"skipped because {reason}: {', '.join(places[:3])}{more}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{text_table(COLUMNS, self.rows(), right=COLUMNS[2:])}\n\n{self.summary()}"
