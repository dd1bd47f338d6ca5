"""What ``senet.attach`` did, or would do: a table for people, an optimiser group for training."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from senet.attachment.site import Site
from senet.attachment.sites import Search
from senet.errors import InputError
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.system.text_table import text_table

# Fresh gates stand still at first: with the last FC zeroed its gradient alone is not zero. They may take larger steps
# than a pretrained network, as a new classifier does.
LR_MULTIPLIER = 10.0
COLUMNS = ("site", "kind", "stage", "channels", "map", "parameters", "multiply-adds")


@dataclass(frozen=True)
class AttachReport:
    """Sites, costs and new parameters of one ``senet.attach``.

    Attributes:
        model: the class of the network.
        config: of the gates.
        search: the sites, the places left out and why, the network's own cost.
        gates: the SE blocks, in the order of ``sites``; empty after a dry run.
    """

    model: str
    config: SEConfig
    search: Search = field(repr=False)
    gates: tuple[SqueezeExcite, ...] = field(repr=False)
    own: tuple[nn.Parameter, ...] = field(repr=False)

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of the run."""
        return self.search.sites

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(place, reason) for each place that got no gate."""
        return self.search.skipped

    @property
    def added_parameters(self) -> int:
        """The values that the gates add."""
        return sum(site.parameters for site in self.sites)

    @property
    def added_mult_adds(self) -> int:
        """The multiply-adds that the gates' FCs add for one image."""
        return sum(site.mult_adds for site in self.sites)

    @property
    def own_parameters(self) -> int:
        """The network's own values, without gates."""
        return sum(parameter.numel() for parameter in self.own)

    def parameters(self, lr: float | None = None) -> dict[str, Any]:
        """The new parameters as a group for any ``torch.optim`` optimiser.

        Args:
            lr: the network's learning rate; the group's becomes ``LR_MULTIPLIER`` times that. None: the group says
                ``lr_scale`` instead, which timm's schedulers multiply by.

        Raises:
            InputError: nothing was attached, in a dry run.
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
        """The totals, and how many places were left out, in a few lines."""
        word = "attached to" if self.gates else "would be attached to"
        blocks = "1 SE block" if len(self.sites) == 1 else f"{len(self.sites)} SE blocks"
        share = f" (+{100 * self.added_parameters / self.own_parameters:.2f} %)" if self.own_parameters else ""
        lines = [f"{blocks} {word} {self.model}: {self.added_parameters:,} parameters{share}"]
        if self.search.mult_adds:
            own = self.search.mult_adds / self.search.images
            lines[0] += f", {self.added_mult_adds:,} multiply-adds an image (+{100 * self.added_mult_adds / own:.3f} %)"
        if self.search.fallback is not None:
            lines.append(f"no place in a block can hold a gate, so the gates go {self.search.fallback}")
        reasons: dict[str, list[str]] = {}
        for place, reason in self.skipped:
            reasons.setdefault(reason, []).append(place)
        for reason, places in reasons.items():
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            lines.append(f"left out, since {reason}: {', '.join(places[:3])}{more}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{text_table(COLUMNS, self.rows(), right=COLUMNS[2:])}\n\n{self.summary()}"
