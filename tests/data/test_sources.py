"""Folders, digits and torchvision datasets: what is found, how it is split, and what is said when it is wrong."""

import json
import os
import pickle
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from helpers.messages import assert_said
from senet.data import catalog, images, walk
from senet.data.decode import BadImageError
from senet.data.images import ArrayStore
from senet.data.sources import open_eval, open_files, open_source
from senet.errors import InputError
from senet.text import json_text, shown


def fill(folder: Path, count: int, size: tuple[int, int] = (12, 12), ext: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (index * 7 % 256, 50, 90)).save(folder / f"{index:03d}.{ext}")
    return folder


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    for name, count in (("dog", 3), ("cat", 4)):
        fill(tmp_path / "train" / name, count)
        fill(tmp_path / "val" / name, 2)
    return tmp_path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of three images."""
    for name in ("cat", "dog"):
        fill(tmp_path / name, 3)
    return tmp_path


def number_in(source: Any) -> int:
    return len(source.train) + len(source.val)


def files_of(names: Iterable[str]) -> list[str]:
    return sorted(Path(name).name for name in names)


def error_of(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_digits_are_scikit_learns() -> None:
    source = open_source("digits")
    bunch = load_digits()
    assert (source.in_chans, source.native_size, source.classes) == (1, 8, tuple("0123456789"))
    assert number_in(source) == 1797
    assert f"{len(source.train)} images to train" in source.split
    assert "seed 0" in source.split
    for part in (source.train, source.val):
        for i in (0, 17, len(part) - 1):
            original = int(part.names[i].removeprefix("digit_"))
            assert part[i].target == bunch.target[original]
            np.testing.assert_allclose(part[i].image[0].numpy(), bunch.images[original] * 255 / 16, atol=0.51)
    pixels = np.stack([source.train[i].image.numpy() for i in range(len(source.train))]) / 255
    assert source.mean == pytest.approx((pixels.mean(),))
    assert source.std == pytest.approx((pixels.std(),))
    assert not set(source.train.names) & set(source.val.names)


def test_digits_split_is_stratified_seeded_and_sized() -> None:
    first, again, other = open_source("digits"), open_source("digits"), open_source("digits", seed=1)
    assert first.val.names == again.val.names != other.val.names
    shares = np.bincount(first.val.targets) / np.bincount(first.val.targets + first.train.targets)
    np.testing.assert_allclose(shares, 0.2, atol=0.004)
    assert len(open_source("digits", val_fraction=0.5).val) == pytest.approx(898, abs=5)


def test_train_and_val_folders(halves: Path) -> None:
    (halves / "train" / ".hidden").mkdir()
    (halves / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (halves / "train" / "cat" / "deeper").mkdir()
    fill(halves / "train" / "cat" / "deeper", 1)
    (halves / "train" / "readme.txt").write_text("not in a class folder")
    source = open_source(halves)
    assert source.classes == ("cat", "dog")
    assert (source.in_chans, source.native_size) == (3, 12)
    assert source.train.targets == [0] * 5 + [1] * 3
    assert source.val.targets == [0, 0, 1, 1]
    assert source.train.names[0] == str(Path("train/cat/000.png"))
    assert source.train.non_images == ()
    assert "8 images" in source.split
    assert "val" in source.split
    assert source.train[1].image.tolist()[0][0][0] == 7


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_validation_folder(halves: Path, name: str) -> None:
    (halves / "val").rename(halves / name)
    assert len(open_source(halves).val) == 4
    fill(halves / "val" / "cat", 1)
    assert len(open_source(halves).val) == 1, "val comes first"


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_without_validation_is_split_and_says_so(tmp_path: Path, below: str) -> None:
    for name, count in (("a", 10), ("b", 5), ("c", 1)):
        fill(tmp_path / below / name, count)
    source = open_source(tmp_path, val_fraction=0.2, seed=3)
    assert np.bincount(source.val.targets, minlength=3).tolist() == [2, 1, 0]
    assert np.bincount(source.train.targets).tolist() == [8, 4, 1]
    assert "no val/ or test/" in source.split
    assert "seed 3" in source.split
    before = set(source.val.names)
    assert set(open_source(tmp_path, seed=3).val.names) == before
    assert any(set(open_source(tmp_path, seed=seed).val.names) != before for seed in range(3))


def test_names_that_are_numbers_stay_text(tmp_path: Path) -> None:
    for name in ("10", "9", "007"):
        fill(tmp_path / name, 2)
    assert open_source(tmp_path).classes == ("007", "10", "9")


def test_a_folder_beats_no_dataset_name_but_a_path_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        fill(tmp_path / "digits" / name, 2)
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits").classes) == 10
    assert len(open_source("./digits").classes) == 2


def test_wrong_folders(tmp_path: Path, halves: Path) -> None:
    assert "missing" in error_of(open_source, tmp_path / "nowhere")
    assert_said(error_of(open_source, halves / "val" / "cat" / "000.png"), "000.png … file … folder")
    (tmp_path / "empty").mkdir()
    assert "is empty" in error_of(open_source, tmp_path / "empty")
    flat = fill(tmp_path / "flat", 2)
    assert "no class folders" in error_of(open_source, flat)
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    assert_said(error_of(open_source, tmp_path / "bare"), "no images … bare")


def test_an_empty_class_stops_training_but_not_validation(halves: Path) -> None:
    (halves / "val" / "emu").mkdir()
    (halves / "val" / "cat" / "000.png").unlink()
    (halves / "val" / "cat" / "001.png").unlink()
    assert open_source(halves).val.targets == [1, 1]
    (halves / "train" / "emu").mkdir()
    (halves / "train" / "emu" / "notes.txt").write_text("nothing")
    message = error_of(open_source, halves)
    assert "train/emu" in message.replace("\\", "/")


def test_a_class_only_in_validation_stops(halves: Path) -> None:
    fill(halves / "val" / "emu", 1)
    assert "emu" in error_of(open_source, halves)


def test_single_images_cannot_be_split(tmp_path: Path) -> None:
    for name in "ab":
        fill(tmp_path / name, 1)
    assert "validate" in error_of(open_source, tmp_path)
    assert "val_fraction" in error_of(open_source, "digits", val_fraction=1.5)


def test_files_that_are_no_images_are_left_out_and_listed(halves: Path) -> None:
    (halves / "train" / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (halves / "train" / "dog" / "notes.txt").write_text("sit")
    (halves / "train" / "dog" / "upper.PNG").write_bytes((halves / "train" / "dog" / "000.png").read_bytes())
    (halves / "train" / "dog" / "photo").write_bytes((halves / "train" / "dog" / "000.png").read_bytes())
    source = open_source(halves)
    assert files_of(source.train.non_images) == ["Thumbs.db", "notes.txt"]
    assert {"upper.PNG", "photo"} <= set(files_of(source.train.names))
    assert len(source.train) == 9


OURS = ("run.json", "compare.json", "fold.json", "tax.json", "excitations.npz", ".senet.lock")
SYSTEMS = ("@eaDir", "__MACOSX", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN", "System Volume Information")


@pytest.mark.parametrize("name", [*SYSTEMS, "#recycle"])
@pytest.mark.parametrize("where", ["", "cat", "cat/deeper"])
def test_folders_of_systems_are_no_data(pets: Path, where: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(pets / where / name / "inner", 2)
    source = open_source(pets)
    assert (source.classes, number_in(source)) == (("cat", "dog"), 6)
    assert [record.message.count(name) for record in caplog.records] == [1]
    assert name in source.split
    assert name in open_eval(pets)[1]
    assert len(open_files([pets])) == 6


@pytest.mark.parametrize("marker", OURS)
@pytest.mark.parametrize("where", ["", "cat"])
def test_folders_of_this_package_are_no_data(
    pets: Path, where: str, marker: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(pets / where / "out" / "figures", 2)
    (pets / where / "out" / marker).write_text("{}")
    source = open_source(pets)
    assert (source.classes, number_in(source)) == (("cat", "dog"), 6)
    assert marker in caplog.text
    assert marker in source.split
    assert len(open_files([pets])) == 6
    assert len(open_files([pets / where / "out"])) == 2, "a folder that the user names is searched"


def test_own_files_are_those_that_the_package_writes() -> None:
    from senet.cli.bench import FILES as BENCH
    from senet.folding import command as fold
    from senet.inspection.report import FILES as REPORT
    from senet.runs.lock import LOCK
    from senet.runs.outputs import COMPARISON, RUN

    written = {RUN.marker, COMPARISON.marker, LOCK, *BENCH, *REPORT, *fold.FILES}
    assert set(OURS) == set(walk.OWN_FILES) <= written


def test_pipes_sockets_and_devices_are_named_and_not_opened(pets: Path) -> None:
    os.mkfifo(pets / "cat" / "pipe.jpg")
    os.mkfifo(pets / "cat" / "pipe")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as plug:
        os.chdir(pets / "dog")  # a socket's path must be short
        try:
            plug.bind("plug.png")
        finally:
            os.chdir(here)
        source = open_source(pets)
    assert number_in(source) == 6
    assert files_of(source.train.non_images) == ["pipe", "pipe.jpg", "plug.png"]
    data = open_files([pets / "cat" / "pipe.jpg", pets / "dog" / "000.png"])
    with pytest.raises(BadImageError, match="a pipe"):
        data[0]


def test_links_that_loop_give_each_image_once(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    for link, target in (("cat/a", "cat"), ("cat/b", "cat"), ("dog/up", "."), ("dog/cats", "cat"), ("self", ".")):
        (pets / link).symlink_to(pets / target)
    (pets / "cat" / "again.png").symlink_to(pets / "cat" / "001.png")
    (pets / "dog" / "me").symlink_to(pets / "dog" / "me")
    source = open_source(pets)
    assert source.classes == ("cat", "dog")
    assert sorted(Path(n).as_posix() for n in source.train.names + source.val.names) == [
        f"{label}/00{i}.png" for label in ("cat", "dog") for i in range(3)
    ]
    assert "again.png" in source.split
    assert "self" in caplog.text
    assert len(open_files([pets])) == 6


def test_links_to_images_elsewhere_are_images(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 4)
    for label, numbers in (("cat", (0, 1, 1)), ("dog", (2, 3))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for place, number in enumerate(numbers):
            (tmp_path / "data" / label / f"{place}.png").symlink_to(store / f"{number:03d}.png")
    source = open_source(tmp_path / "data")
    assert number_in(source) == 4
    linked = tmp_path / "linked"
    linked.mkdir()
    for label in ("cat", "dog"):
        (linked / label).symlink_to(tmp_path / "data" / label)
    assert open_source(linked).classes == ("cat", "dog")
    (linked / "kitty").symlink_to(tmp_path / "data" / "cat")
    assert "the same folder" in error_of(open_source, linked)


def test_strangers_are_left_out_unread_and_a_broken_link_is_a_bad_image(pets: Path) -> None:
    for name in ("originals.zip", "dump"):
        with (pets / "cat" / name).open("wb") as file:
            file.truncate(3 << 30)
    (pets / "cat" / "page.txt").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (pets / "cat" / "list.txt").write_text("P5 is a format\n")
    (pets / "cat" / "raw.nef").write_bytes((pets / "cat" / "000.png").read_bytes())
    (pets / "dog" / "gone.png").symlink_to(pets / "nowhere.png")
    source = open_source(pets)
    left = files_of(source.train.non_images)
    assert left == ["dump", "list.txt", "originals.zip", "page.txt", "raw.nef"]
    assert "gone.png" in files_of(source.train.names + source.val.names)


def test_images_of_too_many_pixels_are_bad_images(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        fill(tmp_path / label, 3, (120, 100))
    source = open_source(tmp_path, max_pixels=11_999)
    for images_of in (source.train, open_eval(tmp_path, max_pixels=11_999)[0], open_files([tmp_path], max_pixels=9)):
        with pytest.raises(BadImageError, match="120x100"):
            images_of[0]
    assert open_source(tmp_path, max_pixels=12_000).train[0].image.shape == (3, 100, 120)


def test_data_one_level_too_high_and_a_single_class_are_refused(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        fill(tmp_path / "photos" / label, 2)
    message = error_of(open_source, tmp_path)
    assert f"give {tmp_path / 'photos'}" in message
    assert "cat, dog" in message
    assert open_source(tmp_path / "photos").classes == ("cat", "dog")
    assert "one class folder, cat" in error_of(open_source, fill(tmp_path / "alone" / "cat", 3).parent)
    fill(tmp_path / "halved" / "train" / "cat", 3)
    fill(tmp_path / "halved" / "val" / "cat", 3)
    assert "one class folder, cat" in error_of(open_source, tmp_path / "halved")
    assert len(open_eval(tmp_path / "alone")[0]) == 3, "one class can be evaluated"


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("TRAIN", "TEST"), ("Training", "Validation")])
def test_halves_in_any_spelling(halves: Path, train: str, val: str) -> None:
    (halves / "train").rename(halves / train)
    (halves / "val").rename(halves / val)
    source = open_source(halves)
    assert (source.classes, len(source.train), len(source.val)) == (("cat", "dog"), 7, 4)
    assert str(halves / train) in source.split
    assert str(halves / val) in source.split
    images_of, sentence = open_eval(halves)
    assert len(images_of) == 4
    assert val in sentence


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for label in ("Car", "Plane", "Train"):
        fill(tmp_path / label, 2)
    assert open_source(tmp_path).classes == ("Car", "Plane", "Train")


def test_validation_alone_is_refused(halves: Path) -> None:
    (halves / "train").rename(halves / "test")
    message = error_of(open_source, halves)
    assert "no train/" in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.heic", "3 HEIC files"), ("a.CR2", "3 camera RAW"), ("a.dng", "3 camera RAW"), ("a.svg", "3 SVG"),
     ("a.mp4", "3 video"), ("a.npy", "3 NumPy")],
)  # fmt: skip
def test_files_that_are_no_images_to_us_are_called_what_they_are(tmp_path: Path, name: str, kind: str) -> None:
    for label in ("cat", "dog", "emu"):
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / label / "Thumbs.db").write_bytes(b"\xd0\xcf")
    for call, data in ((open_source, tmp_path), (open_eval, tmp_path), (open_files, [tmp_path])):
        message = error_of(call, data)
        assert kind in message
        assert "convert" in message


def test_an_empty_name_is_not_the_current_folder() -> None:
    for call in (open_source, open_eval):
        assert "is empty" in error_of(call, "")
        assert "is empty" in error_of(call, " ")


def test_unreadable_folders_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for label in ("cat", "cat/locked", "dog"):
        fill(tmp_path / label, 3)
    locked, scandir = [str(tmp_path / "cat" / "locked")], os.scandir

    def guarded(path: Any) -> Any:
        if os.fspath(path) in locked:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = open_source(tmp_path)
    assert number_in(source) == 6
    assert "cannot read 1 folder" in caplog.text
    assert locked[0] in caplog.text
    for folder in (tmp_path / "dog", tmp_path):
        locked.append(str(folder))
        message = error_of(open_source, tmp_path)
        assert str(folder) in message
        assert "Permission denied" in message


def test_names_that_are_no_utf_8_open_and_are_shown_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = os.fsencode(fill(tmp_path / "cat", 3).parent)
    fill(tmp_path / "dog", 3)
    os.rename(root + b"/dog", root + b"/chi\xe9n")
    os.rename(root + b"/cat/000.png", root + b"/cat/caf\xe9.png")
    Path(os.fsdecode(root + b"/cat/note\x1b[31m\n\xe9.txt")).write_text("none")
    fill(tmp_path / "cat" / "#recycle" / "x", 1).parent.rename(os.fsdecode(root + b"/@eaDir"))
    source = open_source(tmp_path)
    assert source.classes == ("cat", os.fsdecode(b"chi\xe9n"))
    assert tuple(json.loads(json_text(source.classes).encode())) == source.classes
    assert {tuple(one[i].image.shape) for one in (source.train, source.val) for i in range(len(one))} == {(3, 12, 12)}
    assert shown(source.classes[1]) == "chi\ufffdn"
    assert shown(source.train.non_images[0]) == str(Path("cat/note\ufffd[31m\ufffd\ufffd.txt"))
    message = error_of(open_eval, tmp_path, classes=("cat",))
    assert "chi\ufffdn" in message
    message.encode()
    caplog.text.encode()


def test_native_size_only_for_tiny_images_of_one_size(tmp_path: Path) -> None:
    for name, sizes in (("mixed", ((12, 12), (12, 14))), ("wide", ((12, 10), (12, 10))), ("big", ((200, 200),) * 2)):
        for label, size in zip("ab", sizes, strict=True):
            fill(tmp_path / name / label, 2, size)
        assert open_source(tmp_path / name).native_size is None


def test_evaluation_in_the_models_classes(halves: Path) -> None:
    data, sentence = open_eval(halves, classes=("dog", "emu", "cat"))
    assert data.targets == [2, 2, 0, 0]
    assert data.classes == ("dog", "emu", "cat")
    assert "validat" in sentence
    plain, sentence = open_eval(halves / "val")
    assert plain.targets == [0, 0, 1, 1]
    assert "all 4 images" in sentence
    known, _ = open_eval(halves / "val", classes=("dog", "cat"))
    assert known.targets == [1, 1, 0, 0]
    held_out, _ = open_eval(halves / "train", part="val")
    assert held_out.names == open_source(halves / "train").val.names
    assert "'cat'" in error_of(open_eval, halves, classes=("dog", "emu"))
    assert "cat" in error_of(open_eval, halves / "val", classes=("dog", "emu"))
    digits, _ = open_eval("digits", classes=tuple("9876543210"))
    assert digits.targets == [9 - target for target in open_source("digits").val.targets]


def test_files_to_predict_on(halves: Path) -> None:
    (halves / "val" / "cat" / "notes.txt").write_text("no image")
    odd = halves / "picture.dat"
    odd.write_bytes((halves / "val" / "cat" / "000.png").read_bytes())
    data = open_files([odd, halves / "val"])
    assert data.names[0] == str(odd)
    assert len(data) == 5
    assert data.targets == [-1] * 5
    assert data[0].target == -1
    assert files_of(data.non_images) == ["notes.txt"]
    assert "missing" in error_of(open_files, [halves / "nothing.png"])
    (halves / "none").mkdir()
    assert "no images" in error_of(open_files, [halves / "none"])
    assert "no images" in error_of(open_files, [])


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def test_torchvision_arrays_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / "FashionMNIST" / "raw"
    pixels = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        pixels[prefix] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels[prefix])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    source = open_source("fashion-mnist", root=tmp_path)
    assert (len(source.train), len(source.val), source.in_chans, source.native_size) == (30, 20, 1, 28)
    assert source.classes[0] == "T-shirt/top"
    assert source.train.targets[:3] == [0, 1, 2]
    np.testing.assert_array_equal(source.val[3].image[0], pixels["t10k"][3])
    assert source.mean == (0.2860,)


def test_cifar10_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashlib import md5

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    planes = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    contents = [pickle.dumps({"data": planes, "labels": [3, 1, 2, 0]}), pickle.dumps({"label_names": names})]
    batch, meta = (md5(content).hexdigest() for content in contents)
    for part in ("train_list", "test_list"):
        files = [name for name, _ in getattr(CIFAR10, part)]
        monkeypatch.setattr(CIFAR10, part, [[name, batch] for name in files])
        for name in files:
            (folder / name).write_bytes(contents[0])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
    (folder / CIFAR10.meta["filename"]).write_bytes(contents[1])
    source = open_source("cifar10", root=tmp_path)
    assert (len(source.train), len(source.val), source.in_chans, source.native_size) == (20, 4, 3, 32)
    assert source.classes == tuple(names)
    assert source.val.targets == [3, 1, 2, 0]
    np.testing.assert_array_equal(source.val[1].image, planes[1].reshape(3, 32, 32))


def test_torchvision_files_by_name(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in ("n01440764", "n02102040"):
            fill(tmp_path / "imagenette2" / part / wnid, 2, ext="JPEG")
    source = open_source("imagenette", root=tmp_path)
    assert source.train.targets == [0, 0, 1, 1]
    assert source.train[0].image.shape == (3, 12, 12)
    assert source.classes == ("tench", "English springer")  # of each the first name


def test_eurosat_has_no_split_of_its_own(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        fill(tmp_path / "eurosat" / "2750" / name, 5)
    source = open_source("eurosat", root=tmp_path)
    assert (len(source.train), len(source.val)) == (8, 2)
    assert "has no split" in source.split


def test_every_name_is_a_torchvision_dataset_with_these_arguments() -> None:
    import inspect

    from torchvision import datasets

    for name, entry in catalog.DATASETS.items():
        parameters = inspect.signature(getattr(datasets, entry.cls).__init__).parameters
        assert name == entry.cls.lower()
        for arguments in (entry.train, entry.val or {}):
            assert set(arguments) <= set(parameters)


def test_a_failed_download_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("<urlopen error no route\nto host>")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("cifar10", "mnist", "flowers102", "stanfordcars"):
        message = error_of(open_source, name, root=tmp_path / "new")
        assert f"cannot open {name} in" in message


def test_unknown_names_suggest_the_nearest() -> None:
    assert_said(error_of(open_source, "cifra10"), "cifra10 … cifar10")
    assert_said(error_of(open_source, "zzzz"), "zzzz … folder … digits")


def test_image_sets_check_their_lengths_and_indices() -> None:
    store = ArrayStore(np.zeros((3, 4, 4), dtype=np.uint8))
    assert "one target" in error_of(images.ImageSet, store, [0, 1, 2], ("a",), [0, 0], ["x", "y", "z"])
    data = images.ImageSet(store, [0, 1, 2], ("a",), [0, 0, 0], ["x", "y", "z"])
    assert data[-1].number == 2
    with pytest.raises(IndexError):
        data[3]
    assert data.subset([2, 0]).names == ["z", "x"]
