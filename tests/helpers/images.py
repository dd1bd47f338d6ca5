"""Random tensors that are the same at each call, and small image files, drawn here."""

import random

import torch
from PIL import Image, ImageDraw


def maps(*shape, seed=0, dtype=torch.float32):
    """Normal numbers of any shape; without one, two small images that are not square."""
    return torch.randn(*(shape or (2, 3, 6, 5)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(size=64, batch=3, channels=3, dtype=torch.float64, seed=2):
    """A batch of square images, in the precision in which networks are compared."""
    return maps(batch, channels, size, size, seed=seed, dtype=dtype)


def draw_classes(folder, shapes, count, seed, side=12):
    """``<folder>/<class>/<number>.png``: a colored shape somewhere on a gray ground; class → (shape, color)."""
    rng = random.Random(seed)
    for name, (shape, color) in shapes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (side, side), (rng.randrange(90),) * 3)
            x, y = rng.randrange(1, 5), rng.randrange(1, 5)
            pen = ImageDraw.Draw(image)
            if shape == "disc":
                pen.ellipse((x, y, x + 5, y + 5), fill=color)
            else:
                pen.rectangle((x, y, x + 2, side - 1) if shape == "bar" else (x, y, x + 5, y + 5), fill=color)
            image.save(folder / name / f"{number}.png")
    return folder
