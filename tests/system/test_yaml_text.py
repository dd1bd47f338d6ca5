import math

import pytest
import yaml

from senet.errors import InputError
from senet.system.yaml_text import parse, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("1e-2", 0.01),
            ("-1E5", -1e5),
            ("1.", 1.0),
            (".5", 0.5),
            ("+3", 3),
            ("1e999", math.inf),
            ("-.inf", -math.inf),
        ),
        *(("010", 10), ("0o17", 15), ("0x1F", 31)),  # 010 was 8
        *(("no", "no"), ("on", "on"), ("Yes", "Yes"), ("true", True), ("FALSE", False), ("null", None), ("", None)),
        *(("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("'1e-2'", "1e-2")),  # 1:30 was 90
        ("<<: {a: 1}\nb: 2", {"a": 1, "b": 2}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse(text, "it")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: duplicate key 'a'"),
        ("x:\n  b: 1\n  b: 1", "line 3: duplicate key 'b'"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("9" * 5000, "a number with 5000 digits"),
        ("0x" + "f" * 5000, "a number with 5002 digits"),
        *((text, "not valid YAML") for text in ("!!int x", "!!timestamp y", "!!bool maybe", "{[1]: 2}", "[*b]", "\0")),
        ("!!python/object/apply:os.system [echo]", "line 1: "),
    ],
)
def test_what_cannot_be_read_is_one_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(text, "it")
    assert str(caught.value).startswith("it is not valid YAML")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_written_reads_back_in_both_versions():
    texts = ["1e5", "no", "0o17", "010", "1:30", "~", "on", "1e-2", "caf\udce9", "a: b"]
    values = {"texts": texts, "numbers": [1e-5, 1e16, 3, True, None]}
    assert parse(write(values), "it") == yaml.safe_load(write(values)) == values
