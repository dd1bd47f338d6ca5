import inspect
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer.main
from typer.testing import CliRunner

from senet.cli.groups import Attaching, Images, Place, Training, Without, grouped
from senet.cli.main import app
from senet.data.viewing import Viewing


def called(*words):
    seen = {}
    small = typer.Typer()

    @small.command()
    @grouped
    def command(*, name: str = "none", place: Annotated[Place, Without("num_nodes")], images: Images) -> None:
        seen.update(name=name, place=place, images=images)

    result = CliRunner().invoke(small, words)
    return result.exit_code, seen


def test_a_group_arrives_as_one_value():
    code, seen = called("--device", "cpu", "--val-fraction", "0.5", "--name", "x")
    assert code == 0
    assert seen == {"name": "x", "place": Place("cpu"), "images": Images(val_fraction=0.5)}
    assert called()[1] == {"name": "none", "place": Place(), "images": Images()}


def test_what_a_command_leaves_out_it_does_not_take():
    assert called("--devices", "2")[1]["place"] == Place(devices=2)
    assert called("--num-nodes", "2")[0] == 2


@pytest.mark.parametrize("group", [Attaching, Images, Place, Training, Viewing])
def test_every_field_of_a_group_is_an_option(group):
    @grouped
    def command(*, values: group) -> None:
        pass

    assert list(inspect.signature(command).parameters) == [field.name for field in fields(group)]


def test_no_command_lost_an_option():
    commands = typer.main.get_command(app).commands
    for name, few in {
        "train": "devices num_nodes",
        "fold": "size root",
        "inspect": "size root",
        "eval": "root",
    }.items():
        taken = {parameter.name for parameter in commands[name].params}
        assert taken >= {"device", "workers", "on_bad_image", "max_pixels", *few.split()}
    assert not {"root", "on_bad_image"} & {parameter.name for parameter in commands["predict"].params}


def test_an_option_that_nobody_described_is_a_mistake_at_once():
    @dataclass(frozen=True)
    class Strange:
        unheard_of: int = 1

    def command(*, values: Strange) -> None:
        pass

    command.__annotations__ = {"values": Strange, "return": None}
    with pytest.raises(KeyError, match="unheard_of"):
        grouped(command)
