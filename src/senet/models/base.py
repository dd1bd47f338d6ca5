"""What every network of the zoo shares: stem, stages, head, features, and one initialisation for plain and SE twins."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.residual_tail import ResidualTail
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

FIRST_STAGE = 2  # the paper numbers stages from the stem: conv2_x is the first with residual blocks (Table 1)


class ConvNet(nn.Module):
    """A convolutional classifier: ``stem`` → ``stages()`` → ``finish`` → pooling, dropout, ``fc``.

    Input ``(N, in_chans, H, W)`` of any size; output ``(N, num_classes)``, or pooled features ``(N, num_features)``
    with ``num_classes=0``, or with ``features_only`` the list of the stages' maps, highest resolution first, for
    detectors and segmenters (``feature_channels`` and ``feature_strides`` describe them). Keys are alike in all forms.

    Subclasses build their modules, then call ``finish_build``.

    Attributes:
        head_name: the attribute that holds the classifier, and so the first word of its keys.
    """

    head_name: ClassVar[str] = "fc"
    feature_channels: tuple[int, ...]
    feature_strides: tuple[int, ...]

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float, features_only: bool) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r} is not allowed; it must be an integer of at least {least}")
        if not 0 <= drop_rate < 1:
            raise InputError(f"drop_rate={drop_rate!r} is not allowed; it must be at least 0 and below 1")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.features_only = features_only
        self.drop_rate = drop_rate
        # Drawn before any module draws: twins made under one seed get the same values for all that they share.
        self._init_seed = int(torch.randint(2**62, (), device="cpu"))

    def finish_build(self, feature_channels: tuple[int, ...], feature_strides: tuple[int, ...]) -> None:
        """Add the head behind the last stage's channels and initialise every parameter."""
        self.feature_channels = feature_channels
        self.feature_strides = feature_strides
        self.num_features = feature_channels[-1]
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(0 if self.features_only else self.num_classes)
        self.init_weights()

    def structure(self) -> dict[str, bool]:
        """Arguments that change what the network computes and no key or shape of its weights; none, as a rule."""
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; 0 classes: the network gives pooled features."""
        self.num_classes = num_classes
        like = next(self.parameters())  # its device and type: the network may have moved since it was built
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        setattr(self, self.head_name, head or nn.Identity())

    def get_classifier(self) -> nn.Module:
        """The classifier; ``nn.Identity`` where there is none."""
        return getattr(self, self.head_name)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the last layer takes: of ``forward_head(x, pre_logits=True)``."""
        last = [module for module in self.get_classifier().modules() if isinstance(module, nn.Linear)][-1:]
        return last[0].in_features if last else self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """What each stage gives, in timm's words: ``num_chs`` channels, at 1 / ``reduction``, from ``module``."""
        columns = zip(self.feature_channels, self.feature_strides, self.stage_names(), strict=True)
        return [{"num_chs": c, "reduction": stride, "module": names[-1]} for c, stride, names in columns]

    def init_weights(self) -> None:
        """He initialisation (arXiv 1502.01852; section 5.1 of the SE paper): convolutions first, gates last."""
        generator_of = functools.cache(lambda device: torch.Generator(device).manual_seed(self._init_seed))
        gates = [module for module in self.modules() if isinstance(module, SqueezeExcite)]
        inside_gates = {id(inner) for gate in gates for inner in gate.modules()}
        for module in self.modules():
            parameter = next(module.parameters(recurse=False), None)
            if id(module) in inside_gates or parameter is None or parameter.is_meta:
                continue
            generator = generator_of(parameter.device)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                # PyTorch's own default for nn.Linear, drawn from this network's generator.
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        for gate in gates:
            if not gate.fc1.weight.is_meta:
                gate.reset_parameters(generator_of(gate.fc1.weight.device))

    def stem(self, x: Tensor) -> Tensor:
        """The layers before the first stage."""
        raise NotImplementedError

    def stages(self) -> Iterable[Callable[[Tensor], Tensor]]:
        """The stages in order; each halves the resolution of the one before or keeps it."""
        raise NotImplementedError

    def stage_names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each stage's modules, in order."""
        name_of = {id(module): name for name, module in self.named_modules()}
        return tuple((name_of[id(stage)],) for stage in self.stages())

    def finish(self, x: Tensor) -> Tensor:
        """What stands between the last stage and the pooling; nothing, except in pre-activation networks."""
        return x

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The map of each stage, (N, feature_channels[i], H / feature_strides[i], W / feature_strides[i])."""
        x = self.stem(x)
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return [*maps[:-1], self.finish(maps[-1])]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of chosen stages, with timm's signature: ``(last map, maps)``, or ``maps`` alone.

        Args:
            x: (N, in_chans, H, W).
            indices: which stages, 0 is the first and -1 the last; a number alone: so many of the last; None: all.
            norm: does not matter here: only pre-activation networks end in a norm, and the last map always has it.
            stop_early: leave out the stages behind the last chosen one.
            output_fmt: ``"NCHW"``.
            intermediates_only: give the maps alone.

        Raises:
            InputError: there is no such stage, or another format.
        """
        if output_fmt != "NCHW":
            raise InputError(f"forward_intermediates: output_fmt={output_fmt!r} is not known; maps are 'NCHW'")
        chosen = self._stage_indices(indices)
        stages = list(self.stages())
        x, maps = self.stem(x), []
        for index, stage in enumerate(stages):
            x = stage(x) if index + 1 < len(stages) else self.finish(stage(x))
            if index in chosen:
                maps.append(x)
            if index == max(chosen) and (stop_early or intermediates_only):
                break
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of ``indices``, and the classifier; gives the indices, from 0 on.

        What is left is for ``forward_intermediates`` with these indices. A norm behind the last stage goes with that
        stage, whatever ``prune_norm`` says.
        """
        chosen = self._stage_indices(indices)
        unused = [name for names in self.stage_names()[max(chosen) + 1 :] for name in names]
        for name in [*unused, "norm"] if unused and hasattr(self, "norm") else unused:
            self.set_submodule(name, nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.feature_channels)
        if indices is None or isinstance(indices, int):
            chosen = list(range(0 if indices is None else count - indices, count))
        else:
            chosen = [index + count if index < 0 else index for index in indices]
        if not chosen or not all(0 <= index < count for index in chosen):
            raise InputError(f"stages {indices!r} are not in this network; it has {count}, 0 to {count - 1}")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, (N, num_features, H', W')."""
        x = self.stem(x)
        for stage in self.stages():  # not forward_stages: it would keep every stage's map alive
            x = stage(x)
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pooling, dropout and the classifier: (N, num_features, H', W') → (N, num_classes).

        With ``pre_logits`` the last layer is left out: (N, head_hidden_size).
        """
        x = self.dropout(x.mean((2, 3)))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self.forward_stages(x)
        return self.forward_head(self.forward_features(x))


class FlatConvNet(ConvNet):
    """A network whose keys do not nest its stages, as others named it before: ``Mixed_5b``, ``features.7``.

    Attributes:
        stage_rows: the names of each stage's modules, in order. Its stages are functions, not modules.
    """

    stage_rows: tuple[tuple[str, ...], ...]

    def stage_names(self) -> tuple[tuple[str, ...], ...]:
        return self.stage_rows

    def stages(self) -> Iterable[Callable[[Tensor], Tensor]]:
        return [functools.partial(_in_turn, [self.get_submodule(name) for name in row]) for row in self.stage_rows]


def _in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def make_gate(channels: int, se: SEConfig | None, stage: int) -> SqueezeExcite | None:
    """The gate of a network that has one place for it; None in the plain network and in stages without gates.

    Raises:
        InputError: a placement other than ``"standard"``; the others are places in a residual block (Fig. 5).
    """
    if se is None:
        return None
    if se.placement != "standard":
        raise InputError(f"SEConfig: placement={se.placement!r} is for residual networks; here it must be 'standard'")
    return SqueezeExcite(channels, se) if se.in_stage(stage) else None


class ResidualBlock(nn.Module):
    """What residual blocks share: the gate, in any placement, and the end where it meets the shortcut (Fig. 5)."""

    se: SqueezeExcite | None
    tail: ResidualTail

    def add_gate(
        self, se: SEConfig | None, stage: int, *, branch: int, inside: int, entry: int, activation: bool = True
    ) -> None:
        """Add ``se`` (None where this block has no gate) and ``tail``.

        Args:
            se: the configuration; None is the plain network.
            stage: the paper's number of the stage (2 is the first).
            branch: channels at the end of the branch, which are those of the shortcut and of the sum.
            inside: channels after the 3×3 convolution that placement ``"3x3"`` follows.
            entry: channels where the branch begins, for placement ``"pre"``.
            activation: whether a ReLU follows the addition.
        """
        placement = "standard" if se is None else se.placement
        channels = {"pre": entry, "3x3": inside}.get(placement, branch)
        self.se = SqueezeExcite(channels, se) if se is not None and se.in_stage(stage) else None
        self.tail = ResidualTail(placement, activation)

    def gate_entry(self, x: Tensor) -> Tensor:
        """The input of the branch: gated with placement ``"pre"``."""
        return self.se(x) if self.se is not None and self.tail.placement == "pre" else x

    @property
    def inside(self) -> SqueezeExcite | None:
        """The gate behind the 3×3 convolution and its norm, with placement ``"3x3"``."""
        return self.se if self.tail.placement == "3x3" else None

    def gate_inside(self, h: Tensor) -> Tensor:
        """The map behind the 3×3 convolution where no ReLU follows: gated with placement ``"3x3"``."""
        return h if self.inside is None else self.inside(h)


def make_stage(
    block: Callable[..., nn.Module], in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """``blocks`` residual blocks in a row; the first takes ``in_channels`` and has the stride."""
    layers = [block(in_channels, stride=stride)]
    layers += [block(out_channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)
