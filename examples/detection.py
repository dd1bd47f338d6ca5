"""Detect shapes: torchvision's Faster R-CNN with a feature pyramid on a network of this package.

    python examples/detection.py --model se_resnet50 --steps 160 --output detections.png

Circles, squares, and triangles are drawn during training, so nothing is downloaded. The script prints the loss. The
output picture shows new images, with the boxes that the detector finds in them.
"""

import argparse
import time
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.utils import draw_bounding_boxes, save_image

import senet

SHAPES = ("circle", "square", "triangle")
LEVELS = 4  # the pyramid uses the last four stages: strides 4 to 32 in a ResNet


class PyramidBackbone(nn.Module):
    """A backbone for Faster R-CNN: a feature pyramid on the last stages of a network.

    Args:
        name: any registered network.
        width: channels of the pyramid.
        pretrained: as in ``senet.create_model``.
    """

    def __init__(self, name: str, width: int, pretrained: str | None) -> None:
        super().__init__()
        self.trunk = senet.create_model(name, features_only=True, pretrained=pretrained)
        self.strides = self.trunk.feature_strides[-LEVELS:]
        self.pyramid = FeaturePyramidNetwork(self.trunk.feature_channels[-LEVELS:], width)
        self.out_channels = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) → the pyramid's feature maps, (N, width, H / stride, W / stride) for each stride."""
        maps = self.trunk(x)[-LEVELS:]
        return self.pyramid(OrderedDict((str(level), m) for level, m in enumerate(maps)))


def build_detector(name: str, size: int, pretrained: str | None = None) -> FasterRCNN:
    """A detector of ``SHAPES`` for images of ``size`` pixels. Anchors have a side of four strides on each level."""
    backbone = PyramidBackbone(name, 64, pretrained)
    levels = len(backbone.strides)
    return FasterRCNN(
        backbone,
        num_classes=len(SHAPES) + 1,  # 0 is the background
        rpn_anchor_generator=AnchorGenerator(tuple((4 * s,) for s in backbone.strides), ((0.7, 1.0, 1.4),) * levels),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(levels)], output_size=5, sampling_ratio=2),
        min_size=size,
        max_size=size,
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_detections_per_img=4,
        box_nms_thresh=0.3,
    )


def draw_image(size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, size, size) in 0…1 with one to three shapes, and its boxes (x1, y1, x2, y2) and labels."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    image = 0.15 * torch.rand(3, size, size, generator=generator)
    boxes, labels, taken = [], [], torch.zeros(size, size, dtype=torch.bool)
    for _ in range(int(uniform(1, 4))):
        radius = uniform(size / 9, size / 5)
        x, y = uniform(radius, size - radius), uniform(radius, size - radius)
        dx, dy = columns - x, rows - y
        square = (dx.abs() < radius) & (dy.abs() < radius)
        if (taken & square).any():  # shapes do not overlap
            continue
        label = int(uniform(0, len(SHAPES)))
        shape = (dx.square() + dy.square() < radius**2, square, square & (2 * dx.abs() < dy + radius))[label]
        color = 0.4 + 0.6 * torch.rand(3, 1, generator=generator)
        image[:, shape] = color
        taken |= square
        boxes.append([x - radius, y - radius, x + radius, y + radius])
        labels.append(label + 1)
    return image, {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


def train(detector: FasterRCNN, steps: int, batch: int, size: int, rate: float) -> None:
    """Train on new images in every step, and print the mean loss of each tenth of the steps.

    The second part of the loss, which classifies the proposed boxes, rises at first, until there are good proposals.
    """
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    start, shown = time.monotonic(), max(1, steps // 10)
    detector.train()
    for step in range(1, steps + 1):
        images, targets = zip(*(draw_image(size, generator) for _ in range(batch)), strict=True)
        parts = detector(list(images), list(targets))
        finding = parts["loss_objectness"] + parts["loss_rpn_box_reg"]
        naming = parts["loss_classifier"] + parts["loss_box_reg"]
        optimizer.zero_grad()
        (finding + naming).backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append([finding.item(), naming.item()])
        if step % shown == 0:
            first, second = torch.tensor(losses[-shown:]).mean(0).tolist()
            parts_text = f"where: {first:.3f}, what: {second:.3f}"
            print(
                f"step {step:3d}  loss {first + second:.3f} ({parts_text})  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def draw_detections(detector: FasterRCNN, path: str, size: int, least: float, count: int = 8) -> int:
    """Write a PNG of new images with the detected boxes. Returns the number of boxes."""
    generator = torch.Generator().manual_seed(2)
    images = [draw_image(size, generator)[0] for _ in range(count)]
    with torch.inference_mode():
        found = detector.eval()(images)
    pictures, boxes = [], 0
    for image, result in zip(images, found, strict=True):
        sure = result["scores"] >= least
        boxes += int(sure.sum())
        names = [
            f"{SHAPES[label - 1]} {score:.0%}"
            for label, score in zip(result["labels"][sure].tolist(), result["scores"][sure].tolist(), strict=True)
        ]
        picture = (255 * nn.functional.interpolate(image[None], scale_factor=2)[0]).byte()
        if names:
            picture = draw_bounding_boxes(picture, 2 * result["boxes"][sure], names, colors="white", width=2)
        pictures.append(picture)
    save_image(torch.stack(pictures) / 255, path, nrow=4, padding=4, pad_value=1.0)
    return boxes


def main() -> None:
    """Parse the arguments, train, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="se_resnet50", help="any network of `senet list`")
    parser.add_argument("--pretrained", help="weights to start from, as in senet.create_model")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--size", type=int, default=96, help="side of the images, in pixels")
    parser.add_argument("--rate", type=float, default=5e-4, help="maximum learning rate")
    parser.add_argument("--least", type=float, default=0.5, help="minimum score of a box to draw")
    parser.add_argument("--output", default="detections.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    detector = build_detector(arguments.model, arguments.size, arguments.pretrained)
    train(detector, arguments.steps, arguments.batch, arguments.size, arguments.rate)
    boxes = draw_detections(detector, arguments.output, arguments.size, arguments.least)
    print(f"{boxes} boxes drawn: {arguments.output}")


if __name__ == "__main__":
    main()
