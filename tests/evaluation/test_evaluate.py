import math
import re
import shutil

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers.messages import assert_said, one_line
from senet.data.viewing import Viewing
from senet.errors import InputError
from senet.evaluation.evaluate import evaluate, predict
from senet.runs.settings import RunSettings
from senet.training.run import train
from senet.weights.load import build_from_checkpoint, load_weights, save_weights

CLASSES = ("bar", "disc", "square")


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    from senet.runs.recipe import load_recipe

    folder = tmp_path_factory.mktemp("run") / "run"
    # 10 pixels out of 12, so that crops differ.
    recipe = load_recipe("cifar", ["epochs=1", "batch_size=8", "transform.size=10", "transform.resize=12"])
    train(RunSettings(str(pictures), "se_resnet8"), recipe, folder, loggers=False)
    return folder


def by_hand(run, pictures, crops):
    """Probabilities computed with torchvision and Pillow alone: path → (3,)."""
    model, metadata = build_from_checkpoint(run / "last.safetensors")
    mean, std = (torch.tensor(metadata["transform"][key]).view(-1, 1, 1) for key in ("mean", "std"))
    result = {}
    for path in sorted((pictures / "val").rglob("*.png")):
        image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
        views = v2.functional.ten_crop(image, 10) if crops == "ten" else [v2.functional.center_crop(image, 10)]
        with torch.inference_mode():
            logits = model((torch.stack(list(views)) / 255 - mean) / std)
        result[path] = logits.softmax(1).mean(0)
    return result


def test_many_images_are_evaluated_compiled_and_few_as_it_is(run, pictures, graphs, monkeypatch):
    weights, view = run / "last.safetensors", Viewing(batch_size=4)
    few = evaluate(weights, str(pictures), view=view)
    monkeypatch.setattr("senet.evaluation.evaluate.COMPILED_FROM", 15)
    off = evaluate(weights, str(pictures), view=view, compile="off")
    assert not graphs
    many = evaluate(weights, str(pictures), view=view)
    assert (many.images, many.top1_error) == (few.images, few.top1_error) == (off.images, off.top1_error)
    assert 1 <= len(graphs) <= 2  # batches of 4, and the last of 3 images
    answers = [list(predict(weights, [pictures / "val"], view=view, compile=how)) for how in ("off", "senet")]
    for one, other in zip(*answers, strict=True):
        assert (one.name, one.classes) == (other.name, other.classes)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@pytest.mark.parametrize("crops", ["center", "ten"])
def test_error_and_probabilities_are_those_computed_by_hand(run, pictures, crops):
    expected = by_hand(run, pictures, crops)
    wrong = sum(CLASSES[int(p.argmax())] != path.parent.name for path, p in expected.items())
    few = Viewing(batch_size=4)
    found = evaluate(run / "last.safetensors", str(pictures), crops=crops, view=few)
    assert (found.images, found.top1_error) == (15, pytest.approx(100 * wrong / 15))
    assert found.top1_interval[0] <= found.top1_error <= found.top1_interval[1]
    assert (found.top5_error, found.top5_interval) == (None, None)
    predictions = predict(
        run / "last.safetensors", [pictures / "val"], top_k=3, crops=crops, view=Viewing(batch_size=4)
    )
    rows = {row.name: row for row in predictions}
    assert predictions.bad == {}
    assert len(rows) == 15
    for path, probabilities in expected.items():
        row = rows[str(path)]
        assert row.probabilities == pytest.approx(sorted(probabilities.tolist(), reverse=True), abs=2e-6)
        assert math.isclose(sum(row.probabilities), 1, abs_tol=1e-5)
        assert row.classes[0] == CLASSES[int(probabilities.argmax())]


def test_top5_on_many_classes(pictures, tmp_path):
    from senet.data.transforms import TransformSpec
    from senet.weights.create import create_model

    model = create_model("resnet8", 8)
    classes = [*"abcde", *CLASSES]
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([0.0, 1, 2, 3, -9, 4, 5, -9]))  # bar 4th class from above, square never
    metadata = {"model": "resnet8", "num_classes": 8, "in_chans": 3, "se": None, "classes": classes}
    save_weights(tmp_path / "m.safetensors", model, metadata | {"transform": TransformSpec(12).to_dict()})
    found = evaluate(tmp_path / "m.safetensors", str(pictures / "val"))
    assert found.top1_error == pytest.approx(100 * 10 / 15)  # disc is always said
    assert found.top5_error == pytest.approx(100 * 5 / 15)
    assert found.top1_interval == pytest.approx(wilson(10, 15))
    assert found.top5_interval == pytest.approx(wilson(5, 15))


def wilson(part, whole, z=1.959963984540054):
    """Wilson's score interval as he writes it (J. Am. Stat. Assoc. 22, 1927), in percent."""
    share, scale = part / whole, 1 + z * z / whole
    half = z * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    return tuple(100 * (share + z * z / (2 * whole) + sign * half) / scale for sign in (-1, 1))


def test_the_same_folder_means_its_validation_images(pictures, tmp_path):
    """Without a val folder, a run trains on most images of the folder; they must not flatter the evaluation."""
    from senet.runs.recipe import load_recipe

    recipe = load_recipe("cifar", ["epochs=1", "batch_size=8"])
    settings = RunSettings(str(pictures / "train"), "resnet8", val_fraction=0.3)
    result = train(settings, recipe, tmp_path / "run", loggers=False)
    found = evaluate(tmp_path / "run" / "last.safetensors", str(pictures / "train"))
    assert found.images == result.val_images == 9
    assert found.top1_error == pytest.approx(result.val_error, abs=1e-4)
    assert evaluate(tmp_path / "run" / "last.safetensors", str(pictures / "val")).images == 15


def test_other_sizes(run, pictures):
    assert evaluate(run / "last.safetensors", str(pictures), view=Viewing(size=24)).size == 24


@pytest.mark.parametrize("batch_size", [1, 64])
def test_bad_images_are_named_and_the_rest_is_done(run, pictures, tmp_path, batch_size):
    good = pictures / "val" / "disc" / "0.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "readme.txt").write_text("left out, and no mistake")
    predictions = predict(run / "last.safetensors", [good, tmp_path], view=Viewing(batch_size=batch_size))
    assert [row.name for row in predictions] == [str(good)]
    assert sorted(predictions.bad) == [str(tmp_path / "cut.png"), str(tmp_path / "notes.png")]


def test_an_evaluation_with_more_than_one_per_cent_unreadable_stops_with_the_list(run, pictures, tmp_path):
    pictures = shutil.copytree(pictures, tmp_path / "copy")
    (pictures / "val" / "disc" / "cut.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=one_line("0.01 of the 16 images … cut.png")):
        evaluate(run / "last.safetensors", str(pictures))


def test_mistakes(run, pictures, tmp_path):
    weights = run / "last.safetensors"
    for call, message in (
        (lambda: predict(weights, [tmp_path / "none.png"]), "missing"),
        (lambda: predict(weights, [pictures / "val"], top_k=0), "top-k"),
        (lambda: evaluate(tmp_path / "none.safetensors", str(pictures)), "no such weight file"),
        (lambda: evaluate(weights, str(tmp_path)), "is empty"),
        (lambda: evaluate(weights, str(pictures), view=Viewing(device="tpu")), "device"),
        (lambda: evaluate(weights, "digits"), "not among the 3 classes"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    save_weights(tmp_path / "bare.safetensors", build_from_checkpoint(weights)[0], {"model": "se_resnet8"})
    with pytest.raises(InputError, match=r"bare\.safetensors"):
        evaluate(tmp_path / "bare.safetensors", str(pictures))


def altered(run, path, change, **values):
    """The run's weight file with ``change`` applied to its tensors, and other metadata."""
    state, metadata = load_weights(run / "last.safetensors")
    change(state)
    save_weights(path, state, metadata | values)
    return path


def both(weights, pictures):
    """Evaluate and predict; the two messages."""
    messages = []
    for call in (lambda: evaluate(weights, str(pictures)), lambda: list(predict(weights, [pictures / "val"]))):
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
        assert messages[-1].startswith(str(weights))
        assert "\n" not in messages[-1]
    return messages


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["fc.weight", "layer2.0.bn1.running_var", "layer3.0.se.fc2.bias"])
def test_weights_that_are_not_finite_end_both_by_name(run, pictures, tmp_path, key, value):
    weights = altered(run, tmp_path / "w.safetensors", lambda state: state[key].view(-1)[:2].fill_(value))
    for message in both(weights, pictures):
        assert f"{key!r} has 2 of" in message


@pytest.mark.parametrize(
    ("key", "factor", "layer"),
    [
        ("layer2.0.conv1.weight", 3e38, "'layer2.0.conv1' (Conv2d)"),
        ("layer1.0.bn2.running_var", -1, "'layer1.0.bn2' (BatchNorm2d)"),
        ("fc.weight", 1e38, "'fc' (Linear)"),
    ],
)
def test_outputs_that_are_not_finite_end_both_with_the_first_layer(run, pictures, tmp_path, key, factor, layer):
    def change(state):
        state[key] = state[key].sign() * factor if factor > 0 else -state[key] - 1

    weights = altered(run, tmp_path / "w.safetensors", change)
    for message in both(weights, pictures):
        assert f"the output of {layer}" in message


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": 100_000, "resize": None}, "size is 100000"),
        ({"size": 10, "resize": 10**9}, "resize is 1000000000"),
        ({"size": "10"}, 'size is "10"; it must be an integer'),
        ({"size": True}, "size is true"),
        ({"mean": [0.5, None, 0.5]}, r"mean\[1\] is null"),
        ({"std": [1, 1, math.inf]}, r"std\[2\] is Infinity"),
        ({"scale": [0.1]}, "transform"),
        ({"flip": "no"}, "flip is"),
        ({"interpolation": "nearest"}, "'bilinear', 'bicubic'"),
        ({"unknown": 1}, "unknown"),
        ({"mean": [0.5], "std": [0.5]}, "1-channel images, its network takes 3"),
    ],
)
def test_a_damaged_transform_is_one_line(run, pictures, tmp_path, values, named):
    transform = load_weights(run / "last.safetensors")[1]["transform"] | values
    weights = altered(run, tmp_path / "w.safetensors", lambda state: None, transform=transform)
    for message in both(weights, pictures):
        assert re.search(named, message)


def test_other_classes_than_outputs_and_sizes_without_bound_are_one_line(run, pictures, tmp_path):
    weights = altered(run, tmp_path / "w.safetensors", lambda state: None, classes=["bar", "disc"])
    for message in both(weights, pictures):
        assert_said(message, "2 classes … 3")
    with pytest.raises(InputError, match="size is 100000"):
        evaluate(run / "last.safetensors", str(pictures), view=Viewing(size=100_000))
