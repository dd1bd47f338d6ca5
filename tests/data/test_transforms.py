"""Transforms against torchvision's."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from senet.data.decode import ArrayPicture, JpegPicture, open_picture
from senet.data.transforms import TransformSpec, random_area_box, reduction, snapped
from senet.errors import InputError

SPEC = TransformSpec(size=48)
SIZES = [(60, 80), (81, 60), (64, 64), (67, 131), (40, 30), (55, 55)]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


def photo(height: int, width: int) -> np.ndarray:
    """Noise at several sizes and a few edges, so that there is detail at every scale."""
    rng, canvas = np.random.default_rng(0), np.full((height, width, 3), 120.0)
    for cell, amplitude in ((64, 50), (16, 30), (4, 12)):
        small = rng.normal(0, amplitude, (height // cell + 2, width // cell + 2, 3)).clip(-127, 127) + 128
        canvas += np.array(Image.fromarray(small.astype(np.uint8)).resize((width, height))).astype(float) - 128
    canvas[height // 4 : height // 2, width // 3 : width // 2] += 60
    return canvas.clip(0, 255).astype(np.uint8)


class Spy(ArrayPicture):
    """Remembers the reduction it was asked for."""

    asked = 0

    def pixels(self, channels: int, reduce: int = 1) -> tuple[np.ndarray, int]:
        self.asked = reduce
        return super().pixels(channels)


def test_area_boxes_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    rng, peer = random.Random(0), v2.RandomResizedCrop(224)
    image = torch.empty(3, 375, 500)
    ours = np.array([random_area_box(375, 500, SPEC.scale, SPEC.ratio, rng) for _ in range(3000)])
    theirs = [peer.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    columns = [(ours[:, i], theirs[:, i]) for i in range(4)]
    columns.append((ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]))
    columns.append((ours[:, 3] * ours[:, 2], theirs[:, 3] * theirs[:, 2]))
    assert min(stats.ks_2samp(a, b).pvalue for a, b in columns) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (3, 1)])
def test_area_box_falls_back_to_torchvisions_centre(height: int, width: int) -> None:
    box = random_area_box(height, width, (1.0, 1.0), (3 / 4, 4 / 3), random.Random(1))
    peer = v2.RandomResizedCrop(224, scale=(1.0, 1.0)).make_params([torch.empty(3, height, width)])
    assert box == (peer["top"], peer["left"], peer["height"], peer["width"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crop_is_torchvisions_resized_crop(interpolation: str) -> None:
    spec = TransformSpec(size=48, interpolation=interpolation)
    mode = v2.InterpolationMode.BILINEAR if interpolation == "bilinear" else v2.InterpolationMode.BICUBIC
    array, flips = noise(131, 167), 0
    for seed in range(20):
        rng = random.Random(seed)
        box = random_area_box(131, 167, spec.scale, spec.ratio, rng)
        expected = tv.resized_crop(tensor(array), *box, [48, 48], mode, antialias=True)
        if rng.random() < 0.5:
            expected, flips = tv.hflip(expected), flips + 1
        torch.testing.assert_close(spec.train_transform()(array, random.Random(seed)), expected, rtol=0, atol=0)
    assert 0 < flips < 20


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("resize", [None, 48, 53])
def test_evaluation_crop_is_torchvisions(height: int, width: int, resize: int | None) -> None:
    spec = TransformSpec(size=48, resize=resize)
    peer = v2.Compose([v2.Resize(spec.eval_resize, antialias=True), v2.CenterCrop(48)])
    array = noise(height, width)
    torch.testing.assert_close(spec.eval_transform()(array), peer(tensor(array)), rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ten_crop_is_torchvisions(height: int, width: int) -> None:
    peer = v2.Compose([v2.Resize(SPEC.eval_resize, antialias=True), v2.TenCrop(48)])
    array = noise(height, width)
    crops = SPEC.eval_transform("ten")(array)
    assert crops.shape == (10, 3, 48, 48)
    torch.testing.assert_close(crops, torch.stack(peer(tensor(array))), rtol=0, atol=0)


@pytest.mark.parametrize(("augment", "pad", "channels"), [("cifar", 4, 3), ("shift", 1, 1)])
def test_padded_crops_are_exactly_torchvisions(augment: str, pad: int, channels: int) -> None:
    mean = (0.5,) * channels
    transform = TransformSpec(size=16, mean=mean, std=mean, augment=augment).train_transform()
    array = noise(16, 16, channels)
    padded = tv.pad(tensor(array), [pad] * 4)
    flips = (False, True) if augment == "cifar" else (False,)
    outcomes = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            for flip in flips:
                crop = tv.crop(padded, top, left, 16, 16)
                outcomes[(tv.hflip(crop) if flip else crop).numpy().tobytes()] = (top, left, flip)
    seen = [outcomes[transform(array, random.Random(i)).contiguous().numpy().tobytes()] for i in range(3000)]
    assert set(seen) == set(outcomes.values()), "every offset occurs, and nothing else"
    counts = [seen.count(outcome) for outcome in outcomes.values()]
    assert stats.chisquare(counts).pvalue > 1e-3, "all equally often"


@pytest.mark.parametrize("augment", ["cifar", "shift", "none", "imagenet"])
@pytest.mark.parametrize("shape", [(20, 31, 3), (9, 9, 1), (50, 12, 3)])
def test_any_size_in_gives_the_same_size_out(augment: str, shape: tuple[int, int, int]) -> None:
    spec = TransformSpec(size=17, augment=augment)
    array = noise(*shape)
    assert spec.train_transform()(array, random.Random(0)).shape == (3, 17, 17)
    assert spec.eval_transform()(array).shape == (3, 17, 17)
    grey = TransformSpec(size=17, augment=augment, mean=(0.5,), std=(1,))
    assert grey.train_transform()(array, random.Random(0)).shape == (1, 17, 17)


@pytest.mark.parametrize(("augment", "side"), [("cifar", 16), ("cifar", 7), ("imagenet", 8), ("none", 20)])
def test_cutout_erases_one_square_around_each_pixel_equally_often(augment: str, side: int) -> None:
    size, mean = 20, (0.2, 0.5, 0.8)
    spec = TransformSpec(size=size, mean=mean, augment=augment, cutout=side)
    array = np.full((size, size, 3), 255, dtype=np.uint8)  # the padding of "cifar" is 0, and no mean is either
    colour = torch.tensor([51, 128, 204], dtype=torch.uint8).view(3, 1, 1)
    expected = {}
    for y in range(size):
        for x in range(size):
            hole = torch.zeros(size, size, dtype=torch.bool)
            for row in range(y - side // 2, y - side // 2 + side):
                for column in range(x - side // 2, x - side // 2 + side):
                    if 0 <= row < size and 0 <= column < size:
                        hole[row, column] = True
            expected.setdefault(hole.numpy().tobytes(), []).append((y, x))
    seen = []
    for seed in range(3000):
        rng, same = random.Random(seed), random.Random(seed)
        image = spec.train_transform()(array, rng)
        whole = TransformSpec(size=size, mean=mean, augment=augment).train_transform()(array, same)
        hole = (image == colour).all(0)
        assert torch.equal(torch.where(hole, whole, image), whole), "nothing else changes"
        seen.append(expected[hole.numpy().tobytes()][0])
    keys = [places[0] for places in expected.values()]
    weights = np.array([len(places) for places in expected.values()])
    assert stats.chisquare([seen.count(key) for key in keys], 3000 * weights / weights.sum()).pvalue > 1e-3


def test_the_hole_is_the_mean_and_only_in_training() -> None:
    spec = TransformSpec(size=20, augment="cifar", cutout=20)
    array = np.full((20, 20, 3), 255, dtype=np.uint8)
    normalised = spec.normalize(spec.train_transform()(array, random.Random(0)))[:, 10, 10]
    assert normalised.abs().max() <= 0.5 / 255 / min(spec.std)  # the nearest of 256 values
    assert (spec.eval_transform()(array) == 255).all()
    assert (array == 255).all(), "the source is not written"


def test_flip_false_never_mirrors() -> None:
    array = np.broadcast_to(np.arange(10, 250, 15, dtype=np.uint8)[None, :, None], (16, 16, 3))  # brighter to the right
    for augment in ("cifar", "imagenet"):
        plain = TransformSpec(size=16, augment=augment, flip=False, scale=(0.9, 1.0), ratio=(1, 1)).train_transform()
        for seed in range(30):
            row = plain(array, random.Random(seed))[0, 8].tolist()
            visible = [value for value in row if value]  # without the padding
            assert visible[0] < visible[-1]


@pytest.mark.parametrize(("box", "target", "expected"), [(447, 224, 1), (448, 224, 2), (895, 112, 4), (9000, 224, 8)])
def test_reduction_never_goes_below_the_target(box: int, target: int, expected: int) -> None:
    assert reduction(box, box, target, target) == expected
    assert reduction(box, box * 10, target, target) == expected


def test_transforms_ask_for_the_smallest_sufficient_picture() -> None:
    picture = Spy(photo(460, 620))
    SPEC.eval_transform()(picture)
    assert picture.asked == 8  # 460 / 8 = 57 reaches the short side of 55
    whole = TransformSpec(size=112, scale=(1.0, 1.0), ratio=(1.3, 1.35))
    whole.train_transform()(picture, random.Random(0))
    assert picture.asked == 4


def jpeg(height: int, width: int, **options: object) -> JpegPicture:
    buffer = io.BytesIO()
    Image.fromarray(photo(height, width)).save(buffer, "JPEG", quality=90, **options)
    picture = open_picture(buffer.getvalue())
    assert isinstance(picture, JpegPicture)
    return picture


def pillow_crop(picture: JpegPicture, box: tuple[int, int, int, int], height: int, width: int) -> torch.Tensor:
    """The crop as Pillow makes it from the full-size pixels."""
    image = Image.fromarray(picture.pixels(3)[0])
    edges = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    return tensor(np.array(image.resize((width, height), Image.Resampling.BILINEAR, edges))).float()


@pytest.mark.parametrize("size", [48, 100, 112])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_training_crop_looks_like_the_full_one(size: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = jpeg(464, 616, exif=exif.tobytes())
    spec = TransformSpec(size=size, scale=(0.5, 1.0), flip=False)
    reductions = set()
    for seed in range(10):
        box = random_area_box(picture.height, picture.width, spec.scale, spec.ratio, random.Random(seed))
        reduce = reduction(box[2], box[3], size, size)
        small = snapped(box, picture.height // reduce, picture.width // reduce, reduce)
        assert min(small[2:]) >= size, "never decoded below the resolution of the crop"
        moved = tuple(edge * reduce for edge in small)
        assert max(abs(a - b) for a, b in zip(box, moved, strict=True)) <= (0 if reduce == 1 else reduce)
        crop = spec.train_transform()(picture, random.Random(seed)).float()
        difference = crop - pillow_crop(picture, moved, size, size)
        assert difference.abs().mean() < 2.5
        assert difference.mean().abs() < 0.2, "no change of brightness"
        reductions.add(reduce)
    assert max(reductions) > 1


@pytest.mark.parametrize("sides", [(460, 620), (461, 619), (463, 625), (464, 616)])
@pytest.mark.parametrize("size", [48, 100, 112])
def test_reduced_evaluation_crop_looks_like_the_full_one(sides: tuple[int, int], size: int) -> None:
    picture = jpeg(*sides)
    ours = TransformSpec(size=size).eval_transform()(picture).float()
    full = TransformSpec(size=size).eval_transform()(ArrayPicture(picture.pixels(3)[0])).float()
    assert (ours - full).abs().mean() < 2.5
    assert (ours - full).mean().abs() < 0.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (2,), (2, 10)])
def test_normalize_is_torchvisions(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (*lead, 3, 5, 4), dtype=torch.uint8)
    expected = tv.normalize(images.float() / 255, list(SPEC.mean), list(SPEC.std))
    given = images.to(dtype)
    kept = given.clone()
    result = SPEC.normalize(given)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given, kept, rtol=0, atol=0)


def test_mean_subtraction_only_on_either_scale() -> None:
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    unit = TransformSpec(size=2, std=(1, 1, 1), augment="none").normalize(images)
    caffe = TransformSpec(size=2, std=(1 / 255,) * 3, augment="none").normalize(images)
    torch.testing.assert_close(unit[0, :, 0, 0], 100 / 255 - torch.tensor(SPEC.mean))
    torch.testing.assert_close(caffe[0, :, 0, 0], 100 - 255 * torch.tensor(SPEC.mean))


def test_spec_survives_json() -> None:
    spec = TransformSpec(size=32, augment="cifar", resize=36, interpolation="bicubic", flip=False, cutout=16)
    assert TransformSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(InputError, match="colour"):
        TransformSpec.from_dict({"size": 3, "colour": 1})
    with pytest.raises(InputError, match="size is missing"):
        TransformSpec.from_dict({})


def test_with_size_keeps_the_ratio_of_the_resize() -> None:
    assert TransformSpec(size=224).eval_resize == 256
    assert TransformSpec(size=224).with_size(320).eval_resize == 366
    assert TransformSpec(size=224, resize=232).with_size(112).eval_resize == 116
    assert TransformSpec(size=32, augment="cifar").with_size(64).eval_resize == 64
    assert TransformSpec(size=32, augment="cifar", cutout=16).with_size(16).cutout == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"resize": 40},
        {"mean": (0.5,)},
        {"mean": (0.5, 0.5), "std": (1, 1)},
        {"std": (0, 1, 1)},
        {"augment": "mixup"},
        {"interpolation": "nearest"},
        {"scale": (1, 0.5)},
        {"ratio": (0, 1)},
        {"size": 4, "augment": "cifar"},
        {"cutout": -1},
        {"cutout": 49},
    ],
)
def test_wrong_values_are_named(wrong: dict) -> None:
    with pytest.raises(InputError) as caught:
        TransformSpec(**{"size": 48, **wrong})
    assert "\n" not in str(caught.value)


def test_wrong_calls_are_named() -> None:
    with pytest.raises(InputError, match="rng"):
        SPEC.train_transform()(noise(60, 60))
    with pytest.raises(InputError, match="float64"):
        SPEC.eval_transform()(np.zeros((60, 60, 3)))
    with pytest.raises(InputError, match="crops"):
        SPEC.eval_transform("five")


def test_pillow_array_and_tensor_inputs_agree() -> None:
    array = noise(60, 70)
    ours = SPEC.eval_transform()(array)
    torch.testing.assert_close(SPEC.eval_transform()(Image.fromarray(array)), ours, rtol=0, atol=0)
    torch.testing.assert_close(SPEC.eval_transform()(tensor(array)), ours, rtol=0, atol=0)
