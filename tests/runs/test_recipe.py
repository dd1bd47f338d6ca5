import dataclasses

import pytest
import torch
import yaml

from helpers.messages import one_line
from senet.data.sources import open_source
from senet.errors import InputError
from senet.models.registry import NetworkConfig, list_models, model_spec
from senet.runs.recipe import list_recipes, load_recipe, recipe_keys
from senet.training.feed import transform_for
from senet.weights.create import create_model
from senet.weights.known import find_known


@pytest.mark.parametrize(
    "name", ["digits", "cifar", "cifar_wrn", "cifar_shake", "cifar100_shake", "imagenet", "senet154", "finetune"]
)
def test_packaged_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert name in list_recipes()


def test_every_model_names_a_recipe_that_exists():
    assert {model_spec(name).recipe for name in list_models()} <= set(list_recipes())


def test_published_settings():
    imagenet, senet154 = load_recipe("imagenet"), load_recipe("senet154")
    assert (imagenet.batch_size, imagenet.lr, imagenet.epochs) == (1024, 0.6, 100)
    assert [m * imagenet.epochs for m in imagenet.schedule.milestones] == pytest.approx([30, 60, 90])
    assert (senet154.batch_size, senet154.lr, senet154.dropout, senet154.label_smoothing) == (2048, 1.0, 0.2, 0.1)
    wide = load_recipe("cifar_wrn")
    assert [m * wide.epochs for m in wide.schedule.milestones] == pytest.approx([60, 120, 160])
    assert wide.optimizer.nesterov
    assert wide.schedule.gamma == 0.2
    for name, batch_size, lr, decay, hole in (
        ("cifar_shake", 128, 0.2, 1e-4, 16),
        ("cifar100_shake", 32, 0.025, 5e-4, 8),
    ):
        shake = load_recipe(name)
        assert (shake.epochs, shake.batch_size, shake.lr) == (1800, batch_size, lr)
        assert (shake.schedule.name, shake.optimizer.nesterov) == ("cosine", True)
        assert (shake.optimizer.weight_decay, shake.transform.cutout) == (decay, hole)


@pytest.mark.parametrize(
    ("source", "model", "mean", "std"),
    [
        ("default", "mobilenet_v1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("timm:seresnet50.ra2_in1k", "se_resnet50", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("weights.pth", "mobilenet_v1", None, None),
        (None, "mobilenet_v1", None, None),
    ],
)
def test_images_are_normalised_as_known_weights_expect(source, model, mean, std, pictures):
    recipe, data = load_recipe("imagenet"), open_source(str(pictures))
    weights = find_known(source, NetworkConfig(model, se=model_spec(model).se))
    spec, scratch = transform_for(recipe, data, 224, weights), transform_for(recipe, data, 224)
    assert (spec.mean, spec.std) == (mean or scratch.mean, std or scratch.std)
    own = load_recipe("imagenet", ["transform.mean=[0.1, 0.2, 0.3]", "transform.std=[0.3, 0.2, 0.1]"])
    spec = transform_for(own, data, 224, weights)
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))


def test_one_divisor_for_all_channels_is_the_papers_mean_subtraction():
    spec = transform_for(load_recipe("imagenet"), open_source("digits"), 224)
    assert len(set(spec.std)) == 1
    only_mean = dataclasses.replace(spec, std=(1 / 255,) * len(spec.std))  # 0..255 minus the mean, as Caffe had it
    assert spec.mean == open_source("digits").mean
    model = create_model("resnet18", 5, in_chans=1).double()
    images = torch.rand(4, 1, 64, 64, dtype=torch.float64) * 255
    torch.testing.assert_close(
        model(spec.normalize(images).double()), model(only_mean.normalize(images).double()), rtol=1e-3, atol=1e-4
    )


def test_the_recipes_hole_reaches_the_images_and_must_fit_them():
    digits = open_source("digits")  # 8 x 8 pixels
    assert transform_for(load_recipe("cifar_shake", ["transform.cutout=4"]), digits, 32).cutout == 4
    with pytest.raises(InputError, match=one_line("cutout … 16 … 0 to 8")):
        transform_for(load_recipe("cifar_shake"), digits, 32)


def test_overrides():
    recipe = load_recipe(
        "cifar", ["lr=1e-2", "schedule.milestones=[0.2,0.9]", "precision=32", "optimizer.nesterov=true", "ema=0.99"]
    )
    assert recipe.lr == 0.01
    assert recipe.schedule.milestones == (0.2, 0.9)
    assert recipe.precision == "32"
    assert recipe.optimizer.nesterov is True
    assert recipe.ema == 0.99
    assert load_recipe("cifar").lr == 0.1
    assert load_recipe("cifar", ["schedule.name=cosine"]).schedule.milestones == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lrr=1", "did you mean 'lr'"),
        ("schedule.milestone=[0.5]", "did you mean 'schedule.milestones'"),
        ("weight_decay=1", "did you mean 'optimizer.weight_decay'"),
        ("lr", "not KEY=VALUE"),
        ("lr=fast", 'lr: .*number.*"fast"'),
        ("lr=-1", "lr: .*greater than 0.*-1"),
        ("epochs=0", "epochs: .*got 0"),
        ("epochs=1.5", "epochs: .*integer"),
        ("schedule=5", "section"),
        ("lr.x=5", "single value"),
        ("schedule.name=linear", "schedule.name: .*'step', 'cosine' or 'constant'.*\"linear\""),
        ("schedule.milestones=[30, 60]", "schedule.milestones.0: .*less than 1.*30"),
        ("schedule.milestones=[0.6, 0.3]", "milestones"),
        ("schedule.milestones=[0.6", "not valid YAML"),
        ("schedule.warmup_epochs=500", "below epochs"),
        ("precision=8", "precision"),
        ("compile=fast", "compile: .*'senet', 'inductor' or 'off'.*\"fast\""),
        ("compile=[1]", "compile: "),
        ("optimizer.momentum=.nan", "optimizer.momentum"),
        ("transform.cutout=-1", "transform.cutout: .*greater than or equal to 0.*-1"),
        ("accumulate=3", "multiple of accumulate"),
    ],
)
def test_bad_overrides_name_the_field(change, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe("cifar", [change])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr=true", "lr: .*true or false.*true; allowed: above 0, at most 1e"),
        ("epochs=true", "epochs: .*true or false"),
        ("transform.scale=[true, 1]", "transform.scale: .*true or false"),
        ("precision=true", "precision: "),
        ("flip=1", "did you mean 'transform.flip'"),
        ("lr=1e308", "lr: .*1e.308; allowed: above 0, at most 1e"),
        ("lr=-.inf", "lr: "),
        (f"lr={'9' * 399}", "lr: "),
        (f"lr={'9' * 5000}", "5000 digits"),
        (f"epochs={10**20}", "epochs: .*100000000000000000000; allowed: at least 1, at most 1000000"),
        (f"batch_size={2**63}", "batch_size: .*at most"),
        ("mixup=1e-320", "mixup: .*0, or at least 0.001"),
        ("cutmix=1e308", "cutmix: .*at most 1000"),
        ("transform.size=100000", "transform.size: .*100000; allowed: at least 1, at most 8192"),
        ("transform.size=[]", "transform.size: .*integer"),
        ("clip_grad_norm=.nan", "clip_grad_norm: .*finite"),
        ("accumulate=0", "accumulate: .*at least 1"),
        ("name=", "name: "),
        ("lr: 1", "not KEY=VALUE"),
        ("lr=!!int x", "not valid YAML"),
        ("lr={a: 1, a: 2}", "line 1: duplicate key 'a'"),
        ("schedule.name=[" + "[" * 3000, "not valid YAML"),
    ],
)
def test_values_out_of_range_are_one_short_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        load_recipe("cifar", [change])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        *((how, how) for how in ("senet", "inductor", "off")),
        *((text, "inductor") for text in ("true", "yes", "on", "1")),  # it was a boolean
        *((text, "off") for text in ("false", "no", "0")),
    ],
)
def test_compile_is_read_as_it_was_before_too(text, meaning, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(f"epochs: 1\nbatch_size: 8\nlr: 0.1\ncompile: {text}\n")
    recipe = load_recipe(path)
    assert recipe.compile == load_recipe("cifar", [f"compile={text}"]).compile == meaning
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_values_are_read_as_a_person_means_them(tmp_path):
    path = tmp_path / "2024.yaml"
    path.write_text("epochs: 010\nbatch_size: 8\nlr: 1e-2\nabout: no\ntransform: {flip: no}\nema: '0.5'\n")
    recipe = load_recipe(path, ["channels_last=yes", "optimizer.weight_decay=1E-3"])
    assert (recipe.epochs, recipe.lr, recipe.about, recipe.name, recipe.ema) == (10, 0.01, "no", "2024", 0.5)
    assert (recipe.transform.flip, recipe.channels_last, recipe.optimizer.weight_decay) == (False, True, 0.001)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_recipe_that_is_no_readable_file(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(1, 128)))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "long.yaml").write_text("# " + "x" * 2**21)
    (tmp_path / "twice.yaml").write_text("epochs: 1\nbatch_size: 1\nlr: 1\nlr: 2")
    (tmp_path / "section.yaml").write_text("epochs: 1\nbatch_size: 1\nlr: 1\nschedule: 5")
    (tmp_path / "keys.yaml").write_text("1: 2\nnull: 3")
    (tmp_path / "loop.yaml").write_text("epochs: &a [*a]")
    for name, message in (
        ("folder", "cannot be read"),
        ("binary", "not valid YAML"),
        ("latin", "not UTF-8"),
        ("long", "larger than"),
        ("twice", "line 4: duplicate key 'lr'"),
        ("section", "schedule"),
        ("keys", "recipe"),
        ("loop", "epochs: "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_recipe(tmp_path / f"{name}.yaml", ["schedule.name=cosine"])
        assert f"{name}.yaml" in str(caught.value) or "--set" in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in ("", ".", str(tmp_path), "x" * 5000 + ".yaml"):
        with pytest.raises(InputError):
            load_recipe(name)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="did you mean 'cifar'"):
        load_recipe("cifra")
    with pytest.raises(InputError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("just words", "mapping"),
        ("epochs: 3", "batch_size: field required"),
        (yaml.safe_dump({"epochs": 1, "batch_size": 1, "lr": 1, "shedule": {}}), "'shedule'; did you mean 'schedule"),
        ("epochs: 1\nbatch_size: 8\nlr: 1\nschedule: {nmae: cosine}", "'schedule.nmae'; did you mean 'schedule.name'"),
        ("!!python/object/apply:os.system [echo]", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(path)


def test_keys_are_complete():
    assert {"lr", "schedule.milestones", "optimizer.weight_decay", "transform.size"} <= set(recipe_keys())
