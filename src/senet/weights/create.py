"""``senet.create_model``: a registered network, optionally with pretrained weights."""

from typing import Any, Literal

from torch import nn

from senet.models.external import is_elsewhere
from senet.models.registry import NetworkConfig, build_model
from senet.nn.squeeze_excite import SEConfig
from senet.weights.load import load_pretrained


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    se: SEConfig | Literal["from name"] | None = "from name",
    pretrained: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a network of the zoo, with He initialization or pretrained weights.

    With the same seed, a network and its SE twin get the same initial values for the parameters that they share.

    Args:
        name: a registered name, such as ``se_resnet50``; see ``list_models``.
        num_classes: outputs of the classifier; 0 returns pooled features (N, num_features).
        in_chans: channels of the input images.
        se: the SE configuration, if it differs from the name's; None for the plain network.
        pretrained: weights to start from: a file, ``timm:NAME``, ``hf:OWNER/REPO``, ``torchvision:WEIGHTS``,
            ``https://…#sha256=…``, or ``"default"`` for the weights known for this network. See
            ``senet.weights.load.load_pretrained``.
        **kwargs: family-specific arguments, such as ``features_only=True`` or ``drop_rate=0.2``.

    Raises:
        InputError: the name is unknown, the network does not accept an argument, or the weights are not available or
            do not fit the network.
    """
    if is_elsewhere(name) and pretrained == "default":
        kwargs, pretrained = kwargs | {"pretrained": True}, None  # the other library finds them
    model = build_model(name, num_classes, in_chans, se, **kwargs)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def create_described(config: NetworkConfig, pretrained: str) -> nn.Module:
    """The network that ``config`` describes, with the weights of ``pretrained``, including those of its gates."""
    model = config.create()
    load_pretrained(model, pretrained)
    return model
