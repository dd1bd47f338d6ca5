"""Damaged files of every kind end in one line for a person: a few mutants here, many with ``make fuzz``.

``SENET_FUZZ_SECONDS`` a target and ``SENET_FUZZ_SEED`` choose how long and which. A mutant that fails is written to
``fuzz-failures/``; when it is mended, it moves to ``tests/fuzz/seeds/<target>/`` and stays a test.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import senet
from senet.data.decode import BadImageError, open_picture
from senet.runs.recipe import load_recipe
from senet.runs.settings import load_run
from senet.training.state import checked_state
from senet.weights.load import build_from_checkpoint, load_weights

SEEDS = Path(__file__).parent / "seeds"
SECONDS = float(os.environ.get("SENET_FUZZ_SECONDS", 0))
SEED = int(os.environ.get("SENET_FUZZ_SEED", 0))
MUTANTS = 40  # in `make test`
HANGS = 20  # seconds that one mutant may take


# ---------------------------------------------------------------- whole files to begin with


def pictures():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 17, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, form, options in (
        (colour, "JPEG", {"quality": 80, "exif": exif}),
        (colour, "JPEG", {"progressive": True, "subsampling": 0}),
        (colour.convert("L"), "JPEG", {}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "PNG", {}),
        (colour.convert("RGBA"), "PNG", {}),
        (colour.convert("P"), "GIF", {}),
        (colour, "BMP", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)), "TIFF", {}),
        (colour, "WEBP", {"lossless": True}),
        (colour, "PPM", {}),
    ):
        file = io.BytesIO()
        image.save(file, form, **options)
        yield file.getvalue()


def weight_files(ending):
    def files():
        model = senet.create_model("se_resnet8", 3)
        if ending == "pth":
            file = io.BytesIO()
            torch.save({"state_dict": model.state_dict(), "epoch": 3}, file)
            yield file.getvalue()
        else:
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            text = {"model": "se_resnet8", "num_classes": 3, "in_chans": 3, "classes": list("abc")}
            text["se"] = senet.model_spec("se_resnet8").se.to_dict()
            yield save(tensors, metadata={"senet": json.dumps(text)})

    return files


def recipes():
    yield load_recipe("digits").to_yaml().encode()
    yield load_recipe("cifar", ["schedule.name=step", "schedule.milestones=[0.5,0.75]"]).to_yaml().encode()


def runs():
    yield json.dumps({"data": "digits", "model": "se_resnet8", "seed": 3, "se": {"reduction": 4}}, indent=2).encode()


# ---------------------------------------------------------------- what is done with a file


def decode(path):
    pixels, _ = open_picture(path.read_bytes()).pixels(3)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def read_weights(path):
    load_weights(path)
    senet.create_model("se_resnet8", 3, pretrained=path)


def read_network(path):
    build_from_checkpoint(path)


def read_recipe(path):
    assert load_recipe(path).epochs >= 1


def read_run(path):
    (path.parent / "recipe.yaml").write_text(load_recipe("digits").to_yaml())
    path.rename(path.parent / "run.json")
    settings, _ = load_run(path.parent)
    assert isinstance(settings.seed, int)


def read_state(path):
    checked_state(path)


# target: whole files, the name of a mutant's file, what is done with it
TARGETS = {
    "image": (pictures, "image.jpg", decode),
    "pth": (weight_files("pth"), "weights.pth", read_weights),
    "safetensors": (weight_files("safetensors"), "weights.safetensors", read_weights),
    "network": (weight_files("safetensors"), "weights.safetensors", read_network),
    "recipe": (recipes, "recipe.yaml", read_recipe),
    "run": (runs, "run.json", read_run),
    "state": (weight_files("pth"), "last.ckpt", read_state),
}


# ---------------------------------------------------------------- mutants


_VALUES = (b"null", b"[]", b"{}", b"true", b"-1", b"1e999", b"99999999999999999999", b"nan", b"1" * 5000, b'"x"', b"''")


def mutant(data, rng):
    """The content with one to four damages: bits, bytes, cuts, copies, and values of text replaced by others."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        # the first bytes hold the headers, where damage says most
        end = len(data) if rng.random() < 0.5 else min(len(data), 2048)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 16)))
        else:
            found = list(re.finditer(rb'-?\d+(?:\.\d+)?|"[^"\n]{1,40}"|true|false|null', bytes(data[:4096])))
            if found:
                spot = rng.choice(found)
                data[spot.start() : spot.end()] = rng.choice(_VALUES)
    return bytes(data)


class HangError(Exception):
    """A mutant took longer than it may."""


@contextlib.contextmanager
def at_most(seconds):
    def late(*_):
        raise HangError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(target, data, folder):
    """Nothing but the error for people may come out of a file, and that is one line."""
    _, name, use = TARGETS[target]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    try:
        with at_most(HANGS):
            use(path)
    except senet.InputError as error:
        message = str(error)
        is_named = name in message or str(folder) in message or isinstance(error, BadImageError)
        if "\n" in message or len(message) > 1000 or not is_named:
            raise AssertionError(f"not one line that names the file: {message}") from error


@pytest.mark.filterwarnings("ignore")  # what libraries say of damaged files goes to the log
@pytest.mark.parametrize("target", TARGETS)
def test_mutants_end_in_one_line(target, tmp_path):
    files = list(TARGETS[target][0]())
    rng = random.Random(f"{SEED}/{target}")
    end = time.monotonic() + SECONDS
    number = 0
    while number < MUTANTS or time.monotonic() < end:
        data = mutant(rng.choice(files), rng)
        number += 1
        try:
            attempt(target, data, tmp_path / "case")
        except BaseException as error:
            kept = Path("fuzz-failures") / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
            if SECONDS:
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(data)
            raise AssertionError(f"mutant {number} of seed {SEED} ({kept.name}): {error!r}") from error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", sorted(SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_failed_before(seed, tmp_path):
    attempt(seed.parent.name, seed.read_bytes(), tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_whole_files_are_read(target, tmp_path):
    _, name, use = TARGETS[target]
    for number, data in enumerate(TARGETS[target][0]()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(data)
        if target == "state":  # a state is more than weights
            with pytest.raises(senet.InputError, match="not the state of a run"):
                use(folder / name)
        else:
            use(folder / name)
