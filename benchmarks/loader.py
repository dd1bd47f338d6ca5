"""Images per second per core: senet's loader against torchvision's ImageFolder + DataLoader with v2 transforms.

Both read the same JPEG files (generated: noise at many scales, gradients, and sharp edges, about 55 KiB at 500x375) and
return the same normalized float32 batches. One process, one thread, no workers. Rounds are interleaved, and time is CPU
time, which a busy machine affects little. Before anything is timed, the pixels of both are compared.

    python benchmarks/loader.py [--images 192] [--rounds 15] [--no-csv]
"""

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from common import append_row
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from senet.data.decode import open_picture
from senet.data.images import ImageSet
from senet.data.loaders import ImageLoader, make_loader
from senet.data.sources import open_eval
from senet.data.transforms import TransformSpec, random_area_box, reduction, snapped

BATCH = 64
GATE = 2.0  # the largest accepted mean absolute difference, in units of 1/255

# name → (spec, training, file size)
CASES: dict[str, tuple[TransformSpec, bool, tuple[int, int]]] = {
    "train 224": (TransformSpec(size=224), True, (500, 375)),
    "eval 224": (TransformSpec(size=224), False, (500, 375)),
    "train 112": (TransformSpec(size=112), True, (500, 375)),
    "train 160, photos 2000x1500": (TransformSpec(size=160), True, (2000, 1500)),
    "train CIFAR 32, second epoch": (TransformSpec(size=32, augment="cifar"), True, (32, 32)),
}


def draw(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """An image with detail at every scale and soft and hard edges, which costs as much to decode as a photograph."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    slope = x / width * rng.uniform(-80, 80) + y / height * rng.uniform(-80, 80)
    image = slope[:, :, None] + rng.uniform(60, 190, 3)
    for cell, amplitude in ((64, 60), (16, 35), (4, 18), (2, 10), (1, 5)):
        noise = rng.standard_normal((height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        planes = [Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        detail = np.stack([np.asarray(plane) for plane in planes], axis=2)
        gray = detail.mean(axis=2, keepdims=True)
        image = image + amplitude * (gray + 0.4 * (detail - gray))
    for _ in range(12):
        center_x, center_y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.02, 0.2) * width
        inside = (x - center_x) ** 2 + ((y - center_y) * rng.uniform(0.5, 2)) ** 2 < radius**2
        image[inside] += rng.uniform(-70, 70, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, size: tuple[int, int]) -> float:
    """Fill two class folders; returns the mean file size in KiB."""
    rng, total = np.random.default_rng(0), 0
    for index in range(count):
        path = folder / f"class{index % 2}" / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = simplejpeg.encode_jpeg(draw(rng, *size), quality=90, colorsubsampling="420")
        total += path.write_bytes(data)
    return total / count / 1024


def peer_transform(spec: TransformSpec, train: bool, order: str) -> v2.Transform:
    if not train:
        shape = [v2.Resize(spec.eval_resize, antialias=True), v2.CenterCrop(spec.size)]
    elif spec.augment == "cifar":
        shape = [v2.RandomCrop(spec.size, padding=4), v2.RandomHorizontalFlip()]
    else:
        shape = [v2.RandomResizedCrop(spec.size, antialias=True), v2.RandomHorizontalFlip()]
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std)]
    steps = [v2.ToImage(), *shape] if order == "tensors" else [*shape, v2.ToImage()]
    return v2.Compose([*steps, *floats])


def ours(loader: ImageLoader, spec: TransformSpec) -> Iterator[Tensor]:
    for batch in loader:
        yield spec.normalize(batch.images)


def theirs(loader: DataLoader[Any]) -> Iterator[Tensor]:
    for images, _ in loader:
        yield images


def difference(images: ImageSet, spec: TransformSpec, train: bool, count: int = 32) -> float:
    """Mean absolute difference, in 1/255, between our crops and torchvision's from the fully decoded file."""
    transform = spec.train_transform() if train else spec.eval_transform()
    peer, total = peer_transform(spec, False, "tensors"), 0.0
    for index in range(count):
        rng, data = random.Random(index), Path(images.names[index]).read_bytes()
        crop = transform(open_picture(data), random.Random(index)).float()
        full = tv.pil_to_tensor(Image.open(images.names[index]).convert("RGB"))
        if not train:
            scale = torch.tensor(spec.std).view(3, 1, 1) * 255
            expected = peer(full) * scale + torch.tensor(spec.mean).view(3, 1, 1) * 255
        elif spec.augment == "cifar":
            top, left = (4 + rng.randint(-4, 4) for _ in range(2))
            expected = tv.crop(tv.pad(full, [4] * 4), top, left, spec.size, spec.size).float()
        else:
            height, width = full.shape[1:]
            box = random_area_box(height, width, spec.scale, spec.ratio, rng)
            reduce = reduction(box[2], box[3], spec.size, spec.size)
            box = tuple(side * reduce for side in snapped(box, height // reduce, width // reduce, reduce))
            expected = tv.resized_crop(full, *box, [spec.size] * 2, antialias=True).float()
        if train and rng.random() < 0.5:
            expected = expected.flip(2)
        total += float((crop - expected).abs().mean())
    return total / count


def cpu_seconds(batches: Callable[[], Iterator[Tensor]]) -> float:
    start = time.process_time()
    for batch in batches():
        assert batch.dtype == torch.float32
    return time.process_time() - start


def measure(folder: Path, spec: TransformSpec, train: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Interleave all contenders. Returns images per CPU second and, for each peer, the ratio with its quartiles."""
    data, _ = open_eval(folder)
    images = data.with_transform(spec.train_transform() if train else spec.eval_transform())
    loader = make_loader(images, BATCH, train=train)
    contenders: dict[str, Callable[[], Iterator[Tensor]]] = {"senet": lambda: ours(loader, spec)}
    for order in ("tensors", "pillow"):
        peer = DataLoader(ImageFolder(folder, peer_transform(spec, train, order)), BATCH, shuffle=train)
        contenders[order] = lambda peer=peer: theirs(peer)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        loader.set_epoch(number)
        order_now = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in order_now:
            seconds = cpu_seconds(contenders[name])
            if number:  # round 0 warms the caches
                times[name].append(seconds)
    own = np.array(times["senet"])
    table = {}
    for name in ("tensors", "pillow"):
        ratio = np.array(times[name]) / own
        q25, median, q75 = np.quantile(ratio, [0.25, 0.5, 0.75])
        speeds = {
            "senet_per_s": len(images) / np.median(own),
            "torchvision_per_s": len(images) / np.median(times[name]),
        }
        table[name] = {**speeds, "ratio": median, "ratio_q25": q25, "ratio_q75": q75}
    return table


def run_case(name: str, count: int, rounds: int, save: bool) -> None:
    """Generate the files, compare the pixels, time all contenders, print, and save."""
    spec, train, size = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kib = write_images(folder, count, size)
        paths = open_eval(folder)[0]
        gap = difference(dataclasses.replace(paths, names=paths.store.paths), spec, train)
        if gap > GATE:
            sys.exit(f"{name}: pixels differ by {gap:.2f}/255 on average, more than {GATE}: not timed")
        table = measure(folder, spec, train, rounds)
    for peer, row in table.items():
        speeds = f"{row['senet_per_s']:8.0f} {row['torchvision_per_s']:8.0f}"
        spread = f"{row['ratio']:.2f} [{row['ratio_q25']:.2f}, {row['ratio_q75']:.2f}]"
        print(f"{name:30} {kib:5.1f} {gap:8.3f} {peer:8} {speeds}  {spread}", flush=True)
        if save:
            append_row(
                "loader.csv",
                torchvision=torchvision.__version__,
                pillow=PIL.__version__,
                simplejpeg=simplejpeg.__version__,
                transform=name,
                files=f"{size[0]}x{size[1]} {kib:.1f} KiB",
                images=count,
                rounds=rounds,
                mean_abs_diff_255=round(gap, 3),
                torchvision_on=peer,
                **{key: round(value, 3 if key.startswith("ratio") else 1) for key, value in row.items()},
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'transform':30} {'KiB':>5} {'diff/255':>8} {'peer':8} {'senet/s':>8} {'peer/s':>8}  ratio [quartiles]")
    for name, (_, _, size) in CASES.items():
        count = {32: 2048, 2000: max(options.images // 6, 32)}.get(size[0], options.images)
        run_case(name, count, options.rounds, options.csv)


if __name__ == "__main__":
    main()
