"""``senet.create_model``: a network of the registry, with weights if they are asked for."""

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
    """A network of the zoo, initialised as He et al. do or from a file.

    Two networks made under the same seed share the initial values of all parameters that they share, so a network and
    its SE twin start alike.

    Args:
        name: a registered name; ``se_resnet50``, say. ``list_models`` gives all.
        num_classes: outputs of the classifier; 0 gives pooled features (N, num_features).
        in_chans: channels of the input images.
        se: another SE configuration than the name's; None is the plain network.
        pretrained: weights to start from: a file, ``timm:NAME``, ``hf:OWNER/REPO``, ``torchvision:WEIGHTS``,
            ``https://…#sha256=…``, or ``"default"``, those known for this network. See
            ``senet.weights.load.load_pretrained``.
        **kwargs: the family's own arguments, ``features_only=True`` or ``drop_rate=0.2`` say.

    Raises:
        InputError: no such name, an argument that the network does not take, or weights that cannot be had or are not
            this network's.
    """
    if is_elsewhere(name) and pretrained == "default":
        kwargs, pretrained = kwargs | {"pretrained": True}, None  # its own library knows where they are
    model = build_model(name, num_classes, in_chans, se, **kwargs)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def create_described(config: NetworkConfig, pretrained: str) -> nn.Module:
    """The network that ``config`` describes, with the weights of ``pretrained``, its gates' included."""
    model = config.create()
    load_pretrained(model, pretrained)
    return model
