"""The Squeeze-and-Excitation block, and the configuration of every variant that the paper studies."""

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.errors import InputError
from senet.nn.scripting import refuse_to_script
from senet.ops import reference

GATE_NAMES = tuple(name for name in reference.GATES if not name.startswith("identity_"))
MAX_WIDTH = 65536  # channels of a bottleneck
PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"SEConfig: {name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class SEConfig:
    """The configuration of a Squeeze-and-Excitation block. The defaults are the paper's block with FC biases.

    Args:
        reduction: the ratio r of channels to bottleneck width (section 6.1, Table 10).
        squeeze: ``"avg"``, ``"max"`` (Table 11), or ``"none"``: NoSqueeze, 1×1 convolutions at full resolution
            (Table 16).
        gate: ``"sigmoid"``, ``"tanh"``, ``"relu"`` (Table 12), or ``"hard_sigmoid"`` with slope 1/6.
        bias: biases in both FC layers. The released models have them; the paper's ablations do not (section 6).
        divisor: the bottleneck width is rounded to the nearest multiple of this, which is also its minimum.
        hidden: the bottleneck width itself; overrides ``reduction`` and ``divisor``.
        placement: the place of the block in a residual unit (Fig. 5, Tables 14 and 15): ``"standard"`` on the residual
            branch before the addition; ``"pre"`` before the residual unit, inside the branch; ``"post"`` after the
            addition and its ReLU; ``"identity"`` on the shortcut (after its projection, if any); ``"3x3"`` directly
            after the branch's 3×3 convolution and its norm.
        stages: the stages that get a block, numbered as in the paper (2 is the first after the stem); None means all.
        identity_init: the gate is initially exactly 1 (2·sigmoid with the last FC layer zeroed), so the output of a
            network is bit-equal to that of the plain network.

    Raises:
        InputError: a value is not allowed; the message names the argument, the value, and the allowed values.
    """

    reduction: float = 16
    squeeze: str = "avg"
    gate: str = "sigmoid"
    bias: bool = True
    divisor: int = 1
    hidden: int | None = None
    placement: str = "standard"
    stages: tuple[int, ...] | None = None
    identity_init: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.reduction, (int, float)) and not isinstance(self.reduction, bool)
        if not (number and 1 / MAX_WIDTH <= self.reduction <= MAX_WIDTH):
            raise InputError(
                f"SEConfig: reduction={self.reduction!r} is not allowed; it must be a number above 0, "
                f"from 1/{MAX_WIDTH} to {MAX_WIDTH}"
            )
        _one_of("squeeze", self.squeeze, reference.SQUEEZES)
        _one_of("gate", self.gate, GATE_NAMES)
        _one_of("placement", self.placement, PLACEMENTS)
        for name in ("bias", "identity_init"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"SEConfig: {name}={getattr(self, name)!r} is not allowed; it must be True or False")
        for name, optional in (("divisor", False), ("hidden", True)):
            value = getattr(self, name)
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WIDTH:
                raise InputError(
                    f"SEConfig: {name}={value!r} is not allowed; it must be an integer of at least 1, "
                    f"at most {MAX_WIDTH}"
                )
        if self.stages is not None:
            object.__setattr__(self, "stages", _checked_stages(self.stages))

    def hidden_width(self, channels: int) -> int:
        """The bottleneck width: ``channels`` / reduction, rounded to the nearest multiple of ``divisor``."""
        if self.hidden is not None:
            return self.hidden
        return max(self.divisor, int(channels / self.reduction + self.divisor / 2) // self.divisor * self.divisor)

    def in_stage(self, stage: int) -> bool:
        """Whether stage ``stage`` (2 is the first after the stem) gets a block."""
        return self.stages is None or stage in self.stages

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML, as ``SEConfig.from_dict`` accepts them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"stages": None if self.stages is None else list(self.stages)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SEConfig":
        """The configuration from ``values``. An unknown name raises an ``InputError`` that lists the known ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"SEConfig: there is no argument {name!r}; known: {', '.join(known)}")
        return cls(**values)


def _checked_stages(stages: Any) -> tuple[int, ...]:
    message = f"SEConfig: stages={stages!r} is not allowed; give stage numbers, 2 for the first after the stem, or None"
    if not isinstance(stages, (list, tuple)):
        raise InputError(message)
    checked = tuple(stages)
    if not checked or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in checked):
        raise InputError(message)
    return checked


class SqueezeExcite(nn.Module):
    """Squeeze-and-Excitation: rescales each channel by a gate computed from the whole feature map (section 3).

    ``(N, C, *spatial)`` → the same shape, dtype, and memory format, for one, two, or three spatial axes of any size.
    The squeeze adds up in float32 (float64 for float64 inputs). The excitation has the dtype of the parameters of
    ``fc1``, even under autocast: float32 in mixed precision, a half type in a network that was converted to it.
    NoSqueeze, whose excitation has the size of the input, follows autocast.

    The FC layers are 1×1 convolutions, ``fc1`` and ``fc2``, so checkpoints from timm load unchanged. They are called
    like the layers of any network, with squeezed channels as (N, C, 1, 1), and can be replaced: by any module that
    takes and returns such maps, or by ``nn.Linear``. ``config.placement`` and ``config.stages`` apply to networks; the
    block itself ignores them.

    Args:
        channels: C.
        config: the variant.

    Raises:
        ValueError: ``channels`` is not a positive integer; in a call, the number of channels or axes is wrong.
    """

    __prepare_scriptable__ = refuse_to_script

    def __init__(self, channels: int, config: SEConfig | None = None) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise InputError(f"SqueezeExcite: channels={channels!r} is not allowed; give an integer of at least 1")
        self.channels = channels
        self.config = config if config is not None else SEConfig()
        hidden = self.config.hidden_width(channels)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=self.config.bias)
        self.act = nn.ReLU()  # not in place, so that backward hooks on fc1 work
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=self.config.bias)
        self.gate_name = ("identity_" if self.config.identity_init else "") + self.config.gate
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """He initialization, biases 0. With ``identity_init``, the last FC layer is 0, so the gate is exactly 1."""
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)
        if self.config.identity_init:
            nn.init.zeros_(self.fc2.weight)

    def excitation(self, z_nc: Tensor) -> Tensor:
        """The gate of squeezed channels (equation 3), (N, C) → (N, C), in the dtype of the layers."""
        return self._excite_squeezed(z_nc[:, :, None, None]).flatten(1)

    def gate(self, x: Tensor) -> Tensor:
        """The gate for an input: (N, C, *spatial) → (N, C), or (N, C, *spatial) with ``squeeze="none"``."""
        gate = self._gate(x)
        return gate.reshape(x.shape) if self.config.squeeze == "none" else gate.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return reference.scale(x, self._gate(x))

    def fully_connected(self) -> reference.FullyConnected:
        """The excitation as given by the weights of its layers, for implementations that do not call them."""
        return reference.FullyConnected(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.gate_name)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.config}"

    def _gate(self, x: Tensor) -> Tensor:
        """The gate with two spatial axes: (N, C, 1, 1), or (N, C, H, W) with ``squeeze="none"``."""
        x = reference.check_map(x, self.channels)
        if self.config.squeeze == "none":
            return self._excite(reference.as_image(x))
        return self._excite_squeezed(reference.as_image(reference.squeeze(x, self.config.squeeze, keepdim=True)))

    def _excite_squeezed(self, z: Tensor) -> Tensor:
        """``_excite`` in the dtype of the layers, for (N, C, 1, 1)."""
        like = next((p for p in self.fc1.parameters() if p.is_floating_point()), None)
        # torch.fx cannot trace a context: its graphs follow the autocast of their caller.
        apart = nullcontext() if isinstance(z, fx.Proxy) else reference.without_autocast(z.device.type)
        with apart:
            return self._excite(z if like is None else reference.cast(z, like.dtype))

    def _excite(self, z: Tensor) -> Tensor:
        """Equation 3 at each position: (N, C, H, W) → the same shape."""
        return reference.GATES[self.gate_name](_called(self.fc2, self.act(_called(self.fc1, z))))


def _called(fc: nn.Module, z: Tensor) -> Tensor:
    """Call an FC layer on (N, C, H, W). A linear layer takes channels last."""
    return fc(z.movedim(1, -1)).movedim(-1, 1) if isinstance(fc, nn.Linear) else fc(z)
