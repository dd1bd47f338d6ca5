"""Batches depend on (seed, epoch, index) alone; bad images are named, counted, and replaced or left out."""

import dataclasses
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from helpers.messages import one_line
from senet.data import images as images_module
from senet.data.images import ArrayStore, FileStore, ImageSet, PixelCache
from senet.data.loaders import Batch, EpochSampler, ImageLoader, make_loader
from senet.data.sources import open_files
from senet.data.transforms import TransformSpec
from senet.errors import InputError
from senet.folding.search import accuracy_of
from senet.inspection.record import record_excitations
from senet.weights.create import create_model

SPEC = TransformSpec(size=12, augment="imagenet")
pytestmark = pytest.mark.filterwarnings(
    # From Python 3.12 on; DataLoader forks by default and its workers do not touch the parent's threads.
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


def array_set(count: int = 21, seed: int = 0) -> ImageSet:
    arrays = np.random.default_rng(0).integers(0, 256, (count, 16, 20, 3), dtype=np.uint8)
    data = ImageSet(ArrayStore(arrays), list(range(count)), ("a",), [0] * count, [f"image {i}" for i in range(count)])
    return data.with_transform(SPEC.train_transform(), seed)


def file_set(folder: Path, count: int = 20, size: tuple[int, int] = (120, 100), ext: str = "jpg") -> ImageSet:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    for index in range(count):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size).save(folder / f"{index:03d}.{ext}")
    return open_files([folder]).with_transform(SPEC.train_transform())


def epoch(loader: ImageLoader, number: int = 0) -> list[Batch]:
    loader.set_epoch(number)
    return list(loader)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_shapes_and_types() -> None:
    batch = epoch(make_loader(array_set(), 8, train=True))[0]
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, 12, 12), torch.uint8)
    assert batch.images.is_contiguous()
    assert (batch.targets.dtype, batch.indices.dtype) == (torch.int64, torch.int64)
    ten = array_set().with_transform(SPEC.eval_transform("ten"))
    assert next(iter(make_loader(ten, 4, train=False))).images.shape == (4, 10, 3, 12, 12)


def test_workers_change_nothing() -> None:
    loaders = [make_loader(array_set(), 4, train=True, workers=workers, seed=5) for workers in (0, 1, 2)]
    for number in (0, 1):
        alone, one, two = (epoch(loader, number) for loader in loaders)
        assert_same(alone, one)
        assert_same(alone, two)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_within_an_epoch_changes_nothing(workers: int) -> None:
    whole = make_loader(array_set(), 4, train=True, seed=5)
    resumed = make_loader(array_set(), 4, train=True, seed=5, workers=workers, skip=2)
    assert len(resumed) == len(whole)
    assert_same(epoch(whole, 3)[2:], epoch(resumed, 3))
    assert_same(epoch(whole, 4), epoch(resumed, 4))
    resumed.skip_batches(1)
    assert_same(epoch(whole, 4)[1:], epoch(resumed, 4))


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, number: int, augmentation: int = 0) -> Batch:
        return epoch(make_loader(array_set(seed=augmentation), 21, train=True, seed=seed), number)[0]

    base = first(0, 0)
    for other in (first(0, 1), first(1, 0)):
        assert base.indices.tolist() != other.indices.tolist()
        assert sorted(other.indices.tolist()) == list(range(21))
    assert first(0, 1).indices.tolist() != first(1, 0).indices.tolist()
    reseeded = first(0, 0, augmentation=1)
    assert reseeded.indices.tolist() == base.indices.tolist()
    assert not torch.equal(reseeded.images, base.images)
    data = array_set()
    assert torch.equal(data[0, 3].image, data[3].image)
    assert not torch.equal(data[1, 3].image, data[3].image)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_generators_are_left_alone(workers: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    epoch(make_loader(array_set(), 4, train=True, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_global_seeds_do_not_reach_the_batches() -> None:
    torch.manual_seed(1)
    first = epoch(make_loader(array_set(), 4, train=True))
    torch.manual_seed(2)
    random.seed(9)
    assert_same(first, epoch(make_loader(array_set(), 4, train=True)))


def test_sampler_is_a_distributed_sampler_that_shares_training_evenly() -> None:
    samplers = [EpochSampler(array_set(), num_replicas=4, rank=rank, shuffle=True) for rank in range(4)]
    assert isinstance(samplers[0], DistributedSampler)
    for sampler in samplers:
        sampler.set_epoch(2)
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {6} == {len(sampler) for sampler in samplers}
    assert {e for part in parts for e, _ in part} == {2}
    assert {index for part in parts for _, index in part} == set(range(21))
    alone = list(EpochSampler(array_set(), shuffle=True))
    assert sorted(index for _, index in alone) == list(range(21))


@pytest.mark.parametrize("world", [1, 4, 25])
def test_evaluation_sees_every_image_exactly_once(world: int) -> None:
    parts = [list(EpochSampler(array_set(), num_replicas=world, rank=rank, shuffle=False)) for rank in range(world)]
    assert sorted(index for part in parts for _, index in part) == list(range(21))
    if world == 1:
        loader = make_loader(array_set(), 4, train=False)
        assert torch.cat([batch.indices for batch in loader]).tolist() == list(range(21))
        assert len(loader) == 6


def test_more_processes_than_images_still_train_in_step() -> None:
    parts = [list(EpochSampler(array_set(3), num_replicas=8, rank=rank, shuffle=True)) for rank in range(8)]
    assert {len(part) for part in parts} == {1}


def test_a_last_batch_of_one_is_left_out_of_training_only() -> None:
    assert [len(b.targets) for b in epoch(make_loader(array_set(21), 4, train=True))] == [4] * 5
    assert [len(b.targets) for b in epoch(make_loader(array_set(22), 4, train=True))] == [4] * 5 + [2]
    assert [len(b.targets) for b in epoch(make_loader(array_set(21), 4, train=False))] == [4] * 5 + [1]
    assert [len(b.targets) for b in epoch(make_loader(array_set(1), 4, train=True))] == [1]


def spoil(folder: Path) -> None:
    (folder / "000.jpg").write_bytes(b"")
    (folder / "003.jpg").write_bytes((folder / "003.jpg").read_bytes()[:200])
    (folder / "007.jpg").write_bytes(b"words, words")
    (folder / "009.jpg").unlink()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, train: bool
) -> None:
    data = file_set(tmp_path)
    good = epoch(make_loader(data, 5, train=train))
    spoil(tmp_path)
    loader = make_loader(data, 5, train=train, workers=workers, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING, "senet.data"):
        batches = epoch(loader)
        epoch(loader, 1)
    assert {Path(name).name: reason.split(" (")[0] for name, reason in loader.bad.items()} == {
        "000.jpg": "empty file",
        "003.jpg": "damaged image",
        "007.jpg": "not an image",
        "009.jpg": "cannot be read",
    }
    assert len(caplog.records) == 4
    seen = {int(i): image for b in good for i, image in zip(b.indices, b.images, strict=True)}
    for batch in batches:
        for index, image in zip(batch.indices, batch.images, strict=True):
            assert torch.equal(image, seen[int(index)]), "the other images are as if nothing was wrong"
    assert sum(len(batch.targets) for batch in batches) == (20 if train else 16)


def test_training_replaces_bad_images_and_touches_nothing_else(tmp_path: Path) -> None:
    data = file_set(tmp_path)
    whole = torch.cat([batch.indices for batch in epoch(make_loader(data, 1, train=True))]).tolist()
    spoil(tmp_path)
    loader = make_loader(data, 1, train=True, max_bad_fraction=0.2)
    batches = epoch(loader)
    assert [len(batch.targets) for batch in batches] == [1] * 20 == [1] * len(loader)
    mended = torch.cat([batch.indices for batch in batches]).tolist()
    assert all((old in {0, 3, 7, 9}) == (old != new) for old, new in zip(whole, mended, strict=True))
    assert not {0, 3, 7, 9} & set(mended)
    other = torch.cat([batch.indices for batch in epoch(loader, 1)]).tolist()
    assert sorted(other) != sorted(mended), "another epoch, other replacements"


@pytest.mark.parametrize("workers", [0, 2])
def test_replacements_depend_neither_on_workers_nor_on_an_interruption(tmp_path: Path, workers: int) -> None:
    data = file_set(tmp_path)
    spoil(tmp_path)
    whole = epoch(make_loader(data, 3, train=True, seed=2, max_bad_fraction=0.2), 5)
    rest = make_loader(data, 3, train=True, seed=2, max_bad_fraction=0.2, workers=workers, skip=2)
    assert_same(whole[2:], epoch(rest, 5))
    alone = {tuple(batch.indices.tolist()) for batch in epoch(make_loader(data, 1, train=True, max_bad_fraction=1))}
    ranks = [make_loader(data, 1, train=True, max_bad_fraction=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert {tuple(b.indices.tolist()) for rank in ranks for b in epoch(rank)} == alone


def test_a_batch_that_nothing_can_fill_stops_with_the_list(tmp_path: Path) -> None:
    data = file_set(tmp_path, count=4)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"fill a batch.*001\.jpg \(empty file\)"):
        epoch(make_loader(data, 2, train=True, max_bad_fraction=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_taken_named_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    data = file_set(tmp_path / "photos", 30)
    for index in range(25):
        path = Path(data.store.paths[index])
        path.write_bytes(path.read_bytes()[:-60])
    loader = make_loader(data, 10, train=False, workers=workers)
    with caplog.at_level("WARNING", "senet.data"):
        for _ in range(2):
            assert sum(len(batch.targets) for batch in loader) == 30
    assert list(loader.damaged) == data.names[:25]
    assert loader.bad == {}
    named = [record.message for record in caplog.records if "decoded with damage (" in record.message]
    assert len(named) == 20
    assert all(any(name in message for message in named) for name in data.names[:20])
    assert [record.message for record in caplog.records if "25 images" in record.message]
    with pytest.raises(InputError, match="decoded with damage") as caught:
        list(make_loader(data, 10, train=False, workers=workers, on_bad_image="fail"))
    assert data.names[0] in str(caught.value)


def test_too_many_bad_images_stop_with_the_list(tmp_path: Path) -> None:
    data = file_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=one_line("0.1 of the 20 … 3")) as caught:
        epoch(make_loader(data, 5, train=False, max_bad_fraction=0.1))
    for name in ("000.jpg (empty file)", "003.jpg", "007.jpg"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"more than 0\.01"):
        epoch(make_loader(data, 5, train=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_fail_stops_at_the_first_bad_image(tmp_path: Path, workers: int) -> None:
    data = file_set(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=r"000\.jpg: empty file.*--on-bad-image skip"):
        epoch(make_loader(data, 5, train=False, on_bad_image="fail", workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_gives_an_empty_batch_where_all_images_are_bad(tmp_path: Path, workers: int) -> None:
    data = file_set(tmp_path, count=6)
    for index in (2, 3):
        (tmp_path / f"{index:03d}.jpg").write_bytes(b"")
    loader = make_loader(data, 2, train=False, max_bad_fraction=0.5, workers=workers)
    assert [batch.indices.tolist() for batch in loader] == [[0, 1], [], [4, 5]]


def test_what_looks_at_every_batch_passes_over_empty_ones(tmp_path: Path) -> None:
    data = dataclasses.replace(file_set(tmp_path, count=6), classes=("a", "b"), targets=[0, 1, 0, 1, 0, 1])
    (tmp_path / "003.jpg").write_bytes(b"")
    loader = make_loader(data, 1, train=False, max_bad_fraction=0.5)
    network = create_model("se_resnet8", 2)
    assert record_excitations(network, loader, preprocess=SPEC.normalize).images == 5
    assert accuracy_of(loader, SPEC.normalize)(network) in {0, 20, 40, 60, 80, 100}


@pytest.mark.parametrize(("count", "world"), [(21, 2), (5, 4), (2, 4)])
def test_every_process_evaluates_as_many_batches(count: int, world: int) -> None:
    loaders = [make_loader(array_set(count), 2, train=False, rank=rank, world_size=world) for rank in range(world)]
    shares = [list(loader) for loader in loaders]
    assert {len(share) for share in shares} == {len(loader) for loader in loaders} == {-(-count // (2 * world))}
    numbers = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(numbers.tolist()) == list(range(count))
    loaders[-1].skip_batches(1)
    assert len(list(loaders[-1])) == len(loaders[-1]) - 1


def test_files_that_are_no_images_are_said_once_and_do_not_use_up_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    data = file_set(tmp_path)
    with caplog.at_level(logging.WARNING, "senet.data"):
        loader = make_loader(data, 5, train=False)
        assert sum(len(batch.targets) for batch in loader) == 20
    assert {Path(name).name for name in loader.bad} == {"Thumbs.db", "notes.txt"}
    assert len(caplog.records) == 1
    assert "2 files" in caplog.text
    with pytest.raises(InputError, match="2 files"):
        make_loader(data, 5, train=False, on_bad_image="fail")


@pytest.mark.parametrize("ext", ["png", "jpg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tiny_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ext: str, workers: int) -> None:
    data = file_set(tmp_path, size=(12, 12), ext=ext)
    spec = TransformSpec(size=12, augment="cifar")
    data = data.with_transform(spec.train_transform())
    fresh = ImageSet(FileStore(data.store.paths), data.positions, (), data.targets, data.names, data.transform)
    fresh.store.cache = None
    loader = make_loader(data, 5, train=True, workers=workers)
    assert_same(epoch(loader), epoch(make_loader(fresh, 5, train=True)))
    assert data.store.cache.filled.all(), "workers fill the pages of this process too"

    def forbidden(data: bytes) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(images_module, "read_picture", forbidden)
    assert_same(epoch(make_loader(data, 5, train=True), 1), epoch(loader, 1))


def test_the_cache_is_for_small_sets_of_one_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_set(tmp_path / "big", count=2).store.cache is None
    tiny = file_set(tmp_path / "tiny", count=3, size=(12, 12))
    assert tiny.store.cache is not None
    monkeypatch.setattr(images_module, "CACHE_BYTES", 3 * 12 * 12 * 3 - 1)
    assert FileStore(tiny.store.paths).cache is None


def test_an_odd_one_among_tiny_images_is_decoded_every_time(tmp_path: Path) -> None:
    file_set(tmp_path, count=128, size=(12, 12), ext="png")  # of many files, some are looked at
    Image.new("RGB", (30, 40), "red").save(tmp_path / "001.png")
    data = open_files([tmp_path]).with_transform(SPEC.eval_transform())
    assert data.store.cache is not None
    assert data[1].image.shape == (3, 12, 12)
    assert data.store.cache.get(1) is None
    assert data[2].image.shape == (3, 12, 12)
    assert data.store.cache.get(2) is not None


def test_samples_never_alias_the_pixels_in_memory(tmp_path: Path) -> None:
    spec = TransformSpec(size=12, augment="none")
    data = file_set(tmp_path, count=2, size=(12, 12), ext="png")
    for view in (data.with_transform(spec.eval_transform()), data.with_transform(None)):
        before = view[0].image.clone()
        view[0].image.zero_()
        assert torch.equal(view[0].image, before)


def test_a_cache_that_is_sent_to_a_spawned_process_starts_empty() -> None:
    cache = PixelCache(3, 4, 5)
    cache.put(1, np.full((4, 5, 3), 9, dtype=np.uint8))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(1) is None
    copy.put(2, np.zeros((4, 5, 3), dtype=np.uint8))
    assert cache.get(2) is None
    assert cache.get(1).sum() == 9 * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"workers": -1}, "workers -1"),
        ({"skip": -1}, "skip -1"),
        ({"on_bad_image": "ignore"}, "ignore"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_loader(array_set(), **{"batch_size": 4, "train": True, **options})


def test_sets_that_cannot_be_loaded_are_named() -> None:
    with pytest.raises(InputError, match="no transform"):
        make_loader(array_set().with_transform(None), 4, train=True)
    with pytest.raises(InputError, match="empty"):
        make_loader(array_set().subset([]), 4, train=True)
