"""Numbers as people list them."""

import pytest

from linearize.ranges import numbers, spans


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        (" 5, 0-2 ,1", [0, 1, 2, 5]),
        ("7-7", [7]),
        ("8-99999999999", [8, 9, 10, 99999999999]),
        ("12-13", [12, 13]),
    ],
)
def test_what_is_listed(text, found):
    """Of what goes past ten, as much as tells that it does."""
    assert numbers(text, 10) == found


@pytest.mark.parametrize("text", ["", "a", "3-1", "-3", "3-", "1,,2", "1-2-3", "1.5"])
def test_what_is_no_list(text):
    with pytest.raises(ValueError):  # noqa: PT011  (whoever calls says what was given)
        numbers(text, 10)


@pytest.mark.parametrize("text", ["", "4", "0-4,6,8-29", "1-2,4-5"])
def test_they_are_written_as_they_are_read(text):
    assert spans(numbers(text, 30) if text else []) == text
