"""Entry points for ``torch.hub``: ``torch.hub.load("owner/senet", "se_resnet50", pretrained=False, num_classes=10)``.

There is one for each registered network, with the arguments of ``senet.create_model``.
"""

import importlib
import pathlib
import sys

dependencies = ["torch", "safetensors"]


def _import_senet():
    """Import the package of this checkout, without installing it. An already imported one is used as it is."""
    source = str(pathlib.Path(__file__).parent / "src")
    sys.path.insert(0, source)
    try:
        return importlib.import_module("senet")
    finally:
        sys.path.remove(source)


def _entry_point(name):
    def create(pretrained=False, **kwargs):
        # torch.hub passes True or False; a source works as in `create_model`
        source = {True: "default", False: None}.get(pretrained, pretrained)
        return senet.create_model(name, pretrained=source, **kwargs)

    spec = senet.model_spec(name)
    kind = "plain" if spec.se is None else "with Squeeze-and-Excitation"
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name}: family {spec.family}, {kind}, for images of {spec.input_size} pixels.

    Args:
        pretrained: True for the default weights, if any are known, or a source such as a file.
        **kwargs: arguments of ``senet.create_model``: ``num_classes``, ``in_chans``, ``se``, ``features_only``, …
    """
    return create


senet = _import_senet()
globals().update({name: _entry_point(name) for name in senet.list_models()})
