"""The base class of all networks in the zoo: stem, stages, head, features, and the same initialization for twins."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from senet.errors import InputError
from senet.nn.scripting import refuse_to_script
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite

FIRST_STAGE = 2  # the paper numbers stages from the stem: conv2_x is the first with residual blocks (Table 1)


class ConvNet(nn.Module):
    """A convolutional classifier: ``stem`` → ``stages()`` → ``finish`` → pooling, dropout, ``fc``.

    The input is ``(N, in_chans, H, W)`` of any size. The output is ``(N, num_classes)``, or pooled features
    ``(N, num_features)`` with ``num_classes=0``. With ``features_only``, it is the list of the stages' feature maps,
    highest resolution first, for detectors and segmentation networks; ``feature_channels`` and ``feature_strides``
    describe them. The state-dict keys are the same in all three cases.

    Subclasses build their modules, then call ``finish_build``.

    Attributes:
        head_name: the attribute that holds the classifier, and therefore the first component of its keys.
    """

    __prepare_scriptable__ = refuse_to_script
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
        # Drawn before any module draws, so that twins made with the same seed share their initial values.
        self._init_seed = int(torch.randint(2**62, (), device="cpu"))

    def finish_build(self, feature_channels: tuple[int, ...], feature_strides: tuple[int, ...]) -> None:
        """Add the head after the last stage and initialize every parameter."""
        self.feature_channels = feature_channels
        self.feature_strides = feature_strides
        self.num_features = feature_channels[-1]
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(0 if self.features_only else self.num_classes)
        self.init_weights()

    def structure(self) -> dict[str, bool]:
        """Arguments that change the computation but no key or shape of the weights; usually none."""
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier with a new one. With 0 classes, the network returns pooled features."""
        self.num_classes = num_classes
        like = next(self.parameters())  # for device and dtype: the network may have moved since it was built
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        setattr(self, self.head_name, head or nn.Identity())

    def get_classifier(self) -> nn.Module:
        """The classifier, or ``nn.Identity`` if there is none."""
        return getattr(self, self.head_name)

    @property
    def head_hidden_size(self) -> int:
        """Number of inputs of the last layer: the width of ``forward_head(x, pre_logits=True)``."""
        last = [module for module in self.get_classifier().modules() if isinstance(module, nn.Linear)][-1:]
        return last[0].in_features if last else self.num_features

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Each stage's output in timm's terms: ``num_chs`` channels at 1 / ``reduction``, from ``module``."""
        columns = zip(self.feature_channels, self.feature_strides, self.stage_names(), strict=True)
        return [{"num_chs": c, "reduction": stride, "module": names[-1]} for c, stride, names in columns]

    def init_weights(self) -> None:
        """He initialization (arXiv 1502.01852; section 5.1 of the SE paper): gates last, so that twins agree."""
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
                # PyTorch's default for nn.Linear, drawn from this network's generator.
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
        """The stages in order. Each one halves or keeps the resolution of the previous one."""
        raise NotImplementedError

    def stage_names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each stage's modules, in order."""
        name_of = {id(module): name for name, module in self.named_modules()}
        return tuple((name_of[id(stage)],) for stage in self.stages())

    def finish(self, x: Tensor) -> Tensor:
        """The layers between the last stage and the pooling: none, except in pre-activation networks."""
        return x

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The feature map of each stage, (N, feature_channels[i], H / feature_strides[i], W / feature_strides[i])."""
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
        """The feature maps of selected stages, with timm's signature: ``(last map, maps)``, or only ``maps``.

        Args:
            x: (N, in_chans, H, W).
            indices: the stages, 0 is the first and -1 the last. An integer n selects the last n; None selects all.
            norm: has no effect: only pre-activation networks end in a norm, and it is always applied to the last map.
            stop_early: skip the stages after the last selected one.
            output_fmt: ``"NCHW"``.
            intermediates_only: return only the list of feature maps.

        Raises:
            InputError: a stage does not exist, or the format is not ``"NCHW"``.
        """
        if output_fmt != "NCHW":
            raise InputError(f"forward_intermediates: output_fmt={output_fmt!r} is not supported; use 'NCHW'")
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
        """Drop the stages after the last of ``indices``, and the classifier. Returns the indices as non-negative.

        Call ``forward_intermediates`` with these indices on the remaining network. A norm after the last stage is
        dropped with that stage, whatever ``prune_norm`` is.
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
            raise InputError(f"stages {indices!r} do not exist; this network has {count}: 0 to {count - 1}")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, num_features, H', W')."""
        x = self.stem(x)
        for stage in self.stages():  # not forward_stages, which keeps the feature maps of all stages alive
            x = stage(x)
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pooling, dropout, and the classifier: (N, num_features, H', W') → (N, num_classes).

        With ``pre_logits``, the last layer is skipped: (N, head_hidden_size).
        """
        x = self.dropout(x.mean((2, 3)))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self.forward_stages(x)
        return self.forward_head(self.forward_features(x))


class FlatConvNet(ConvNet):
    """A network whose established key names do not nest its stages: ``Mixed_5b``, ``features.7``.

    Attributes:
        stage_rows: the names of each stage's modules, in order. The stages are functions, not modules.
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
    """The gate of a block without a shortcut; None in the plain network and in stages without gates.

    Raises:
        InputError: the placement is not ``"standard"``; the others need a residual block (Fig. 5).
    """
    if se is None:
        return None
    if se.placement != "standard":
        raise InputError(f"SEConfig: placement={se.placement!r} is for residual networks; here it must be 'standard'")
    return SqueezeExcite(channels, se) if se.in_stage(stage) else None


class ResidualBlock(nn.Module):
    """Base class of residual blocks: holds the gate and knows its place in the block (Fig. 5).

    A block passes its feature maps through ``at`` at each of the five places; the one of the configuration has the
    gate. Nothing is computed in place, because PyTorch does not allow full backward hooks on modules whose input or
    output is overwritten.
    """

    se: SqueezeExcite | None

    def add_gate(self, se: SEConfig | None, stage: int, *, branch: int, inside: int, entry: int) -> None:
        """Set ``se``: None if this block has no gate.

        Args:
            se: the configuration; None for the plain network.
            stage: the stage number in the paper (the first is 2).
            branch: channels at the end of the branch, and of the shortcut and the sum.
            inside: channels after the 3×3 convolution, for placement ``"3x3"``.
            entry: channels at the start of the branch, for placement ``"pre"``.
        """
        self.placement = "standard" if se is None else se.placement
        channels = {"pre": entry, "3x3": inside}.get(self.placement, branch)
        self.se = SqueezeExcite(channels, se) if se is not None and se.in_stage(stage) else None

    def at(self, placement: str, x: Tensor) -> Tensor:
        """``x``, rescaled if the gate has this place."""
        return self.se(x) if self.se is not None and placement == self.placement else x


def make_stage(
    block: Callable[..., nn.Module], in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    """A sequence of ``blocks`` residual blocks. Only the first has ``in_channels`` inputs and the stride."""
    layers = [block(in_channels, stride=stride)]
    layers += [block(out_channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)
