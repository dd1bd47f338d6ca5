"""The networks for ``torch.hub``: ``torch.hub.load("owner/senet", "se_resnet50", pretrained=False, num_classes=10)``.

There is one entry point for each registered network, with the arguments of ``senet.create_model``.
"""

import importlib
import pathlib
import sys

dependencies = ["torch", "safetensors"]


def _import_senet():
    """The package of this checkout, which need not be installed; one that is loaded already stays."""
    source = str(pathlib.Path(__file__).parent / "src")
    sys.path.insert(0, source)
    try:
        return importlib.import_module("senet")
    finally:
        sys.path.remove(source)


def _entry_point(name):
    def create(pretrained=False, **kwargs):
        # torch.hub's True and False, beside a source as `create_model` takes it
        source = {True: "default", False: None}.get(pretrained, pretrained)
        return senet.create_model(name, pretrained=source, **kwargs)

    spec = senet.model_spec(name)
    kind = "plain" if spec.se is None else "with Squeeze-and-Excitation"
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name}: family {spec.family}, {kind}, for images of {spec.input_size} pixels.

    Args:
        pretrained: True for the default weights where there are some, or a source such as a file's path.
        **kwargs: of ``senet.create_model``: ``num_classes``, ``in_chans``, ``se``, ``features_only``, …
    """
    return create


senet = _import_senet()
globals().update({name: _entry_point(name) for name in senet.list_models()})
