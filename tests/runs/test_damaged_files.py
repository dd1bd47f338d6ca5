"""Every value of every file of ours, replaced by something that it cannot be: one line that names file and field."""

import functools
import json
import shutil

import pytest
import yaml

from senet.cli.main import main
from senet.comparison.files import MARKER, check_same, save_comparison
from senet.errors import InputError
from senet.runs.data_record import load_record
from senet.runs.recipe import load_recipe
from senet.runs.settings import RunSettings, load_result, load_run
from senet.training.curves import read_csv
from senet.training.run import train

WRONG = (None, [], {}, 3, True, "text", -1.5, float("nan"), float("inf"), 10**400, [[None]])
UNREADABLE = ("", "{", "[1]", "null", "3", '"text"', "[" * 5000 + "]" * 5000, "9" * 5000, '{"data": \x00}')


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    recipe = load_recipe("cifar", ["epochs=1", "batch_size=8"])
    settings = RunSettings(str(pictures / "train"), "se_resnet8", se=(("reduction", 4),))
    train(settings, recipe, folder, loggers=False)
    save_comparison(folder, "resnet8", settings, recipe)
    return folder


def leaves(values, path=()):
    """Paths of everything in nested dictionaries and lists, these themselves too; of a long list its first value."""
    if path:
        yield path
    items = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(values, path, new):
    copy = json.loads(json.dumps(values))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return copy


def compared(folder):
    check_same(folder, "resnet8", *_as_saved(folder))


@functools.cache
def _as_saved(folder):
    values = json.loads((folder / "run.json").read_text())
    return RunSettings(**values | {"se": (("reduction", 4),)}), load_recipe(folder / "recipe.yaml")


def problem(load, path):
    """The message of the InputError that a call raises, None for a call that is right."""
    try:
        load(path)
    except InputError as error:
        return str(error)
    return None


def may_be(path, values, new):
    """Whether ``new`` is of the kind that belongs at a path; recipes and SE options have checks of their own."""
    if "recipe" in path or "se" in path:
        return True
    for key in path:
        values = values[key]
    optional = path[-1] in OPTIONAL and (new is None or values is None)
    return optional or type(new) is type(values) or (type(new) is int and type(values) is float)


OPTIONAL = {"settings", "pretrained", "limit_batches", "root", "workers", "val_top5_error"}
LOADERS = {"run.json": load_run, "result.json": load_result, "data.json": load_record, MARKER: compared}


@pytest.mark.parametrize("name", LOADERS)
def test_each_value_of_a_json_file(run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "run")
    good = json.loads((run / name).read_text())
    LOADERS[name](folder)
    for path in leaves(good):
        for wrong in WRONG:
            values = replaced(good, path, wrong)
            (folder / name).write_text(json.dumps(values))
            message = problem(LOADERS[name], folder)
            if message is None:
                assert may_be(path, good, wrong), (path, wrong)
                continue
            assert "\n" not in message
            assert len(message) < 600
            if "damaged" in message:  # else it is the value of another run
                assert str(folder / name) in message
                assert any(str(key) in message for key in path)


@pytest.mark.parametrize("name", LOADERS)
def test_a_json_file_that_is_something_else(run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "run")
    good = (run / name).read_text()
    cut, more = good[: len(good) // 2], json.dumps(json.loads(good) | {"unknown": 1})
    for text in (*UNREADABLE, cut, more):
        (folder / name).write_text(text)
        with pytest.raises(InputError, match="damaged") as caught:
            LOADERS[name](folder)
        assert str(folder / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    (folder / name).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="damaged"):
        LOADERS[name](folder)


def test_each_value_of_a_recipe(run, tmp_path):
    good = yaml.safe_load((run / "recipe.yaml").read_text())
    for path in leaves(good):
        for wrong in (None, ["text"]):
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(replaced(good, path, wrong)))
            message = problem(load_recipe, tmp_path / "recipe.yaml")
            if message is not None:
                assert str(tmp_path / "recipe.yaml") in message
                assert "\n" not in message


def test_curves(run, tmp_path):
    good = (run / "curves.csv").read_text()
    assert read_csv(run / "curves.csv")[0]["epoch"] == 1
    header, row = good.splitlines()
    for text in (
        "",
        header,
        f"{header}\nx{row}",
        f"{header}\n1,,,,,,,",
        f"{header}\n1,nan",
        f"{header}\n1",
        "a\n1",
        row,
    ):
        (tmp_path / "curves.csv").write_text(text)
        with pytest.raises(InputError, match=r"curves\.csv is damaged"):
            read_csv(tmp_path / "curves.csv")
    (tmp_path / "curves.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError, match=r"curves\.csv is damaged"):
        read_csv(tmp_path / "curves.csv")


def test_the_commands_say_so_in_one_line(run, tmp_path, pictures, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").write_text("[1]")
    for words in (
        ("eval", "--checkpoint", folder / "best.safetensors", "--data", pictures / "train"),
        ("train", "--resume", folder),
        ("train", "--data", pictures / "train", "--model", "se_resnet8", "--resume", "-o", folder),
    ):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "run.json is damaged" in error


def test_files_of_the_version_before_are_read(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    values = json.loads((run / "run.json").read_text())
    few = {key: values[key] for key in ("data", "model", "seed", "se", "val_fraction")}
    (folder / "run.json").write_text(json.dumps(few))
    assert load_run(folder)[0].se == (("reduction", 4),)
    (folder / MARKER).write_text(json.dumps({"plain": "resnet8", "se": "se_resnet8", "data": "photos"}))
    compared_with = load_run(folder)
    check_same(folder, "resnet8", *compared_with)
