import datetime

import pytest

from senet.text import brief, did_you_mean, first_line


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        (float("inf"), "Infinity"),
        ("é", '"é"'),
        ([1, "a"], '[1, "a"]'),
        (list(range(9)), "a list of 9 entries"),
        (dict.fromkeys(range(9)), "an object of 9 entries"),
        (datetime.date(2020, 1, 2), "2020, 1, 2"),
    ],
)
def test_a_value_in_few_words(value, words):
    assert words in brief(value)


@pytest.mark.parametrize("value", ["x" * 10**6, [["x" * 10**6]], {"y" * 10**6: 1}])
def test_words_stay_few_however_large_the_value(value):
    assert len(brief(value)) < 80


def test_a_number_that_python_cannot_print_has_words():
    assert "thousands of digits" in brief(10**5000)


def test_a_value_of_any_depth_has_words():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert len(brief(value)) < 80


NAMES = ["cifar10", "cifar100", "mnist", "flowers102"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("cif", "did you mean 'cifar10' or 'cifar100'?"),
        ("minst", "did you mean 'mnist'?"),
        ("photos", "see the list"),
        ("", "see the list"),
    ],
)
def test_a_hint_names_what_begins_so_or_is_nearest(word, hint):
    assert did_you_mean(word, NAMES, "see the list", count=2) == hint


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 10_000))) == 200
