"""CSV: what is written reads back, and no cell is a formula."""

import csv
import io

import pytest

from senet.system.csv_file import csv_text, write_csv, write_rows


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\tx", "=HYPERLINK(1)"])
def test_a_name_is_no_formula(name):
    (row,) = read(csv_text(["class"], [{"class": name}]))
    assert row["class"] == f"'{name}"


@pytest.mark.parametrize("value", [-0.1, -3, 1e-300, "-0.25", "+1", "-inf", "plain", "a=b", "x\ny", 'a "b", c'])
def test_numbers_and_other_texts_are_left_alone(value):
    (row,) = read(csv_text(["value"], [{"value": value}]))
    assert row["value"] == str(value)


def test_nothing_is_an_empty_cell():
    assert csv_text(["a", "b"], [{"a": None, "b": 1.5}]) == "a,b\n,1.5\n"


def test_a_name_that_is_no_utf8_keeps_its_bytes(tmp_path):
    write_csv(tmp_path / "names.csv", ["name"], [{"name": "caf\udce9.jpg"}])
    assert (tmp_path / "names.csv").read_bytes() == b"name\ncaf\xe9.jpg\n"


def test_rows_can_be_added_to_a_file_that_has_its_header():
    text = io.StringIO()
    for number in range(2):
        write_rows(text, ["a", "b"], [{"a": number, "b": None}], header=number == 0)
    assert text.getvalue() == "a,b\n0,\n1,\n"
