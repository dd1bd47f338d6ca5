"""Recorded gates that are made up: values of any numbers of images, channels and classes."""

import numpy as np

import senet
from senet.inspection.site_excitations import SiteExcitations
from senet.surgery.find_gates import Gate


def gate(name="se", channels=8, high=1.0):
    """A sigmoid's, or one that opens further."""
    return Gate(name, "senet", channels, "sigmoid", 0.0, 0.5, high, None)


def site_of(values, targets, images=None, *, of=None, classes, top=8, batch=None):
    """What one gate gave for each image, (images, channels), seen in batches."""
    images = np.arange(len(values)) if images is None else images
    site = SiteExcitations.empty(of or gate(channels=values.shape[1]), classes, values.shape[1], top)
    for start in range(0, len(values), batch or len(values)):
        part = slice(start, start + (batch or len(values)))
        site.update(values[part], targets[part], images[part])
    return site


def recording_of(values, targets, classes):
    """Excitations of a network, by the gates' names, and of images that lie in folders of their classes."""
    sites = {
        name: site_of(each, targets, of=gate(name, each.shape[1]), classes=len(classes))
        for name, each in values.items()
    }
    names = {i: f"val/{classes[c]}/{i}.png" if c >= 0 else f"val/{i}.png" for i, c in enumerate(targets)}
    return senet.Excitations(sites, tuple(classes), names, {"model": "se_test", "data": "made up"})
