"""Sizes in bytes and durations, as people write them."""

from __future__ import annotations

import pytest

from selfspec.errors import InputError
from selfspec.utils.sizes import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 2**29), ("4G", 2**32), ("1.5GiB", 3 * 2**29), ("77", 77), ("2kb", 2048)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-4G", "0", "4Q", "infM"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a size such as 512M or 4G is expected"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), (" 1.5H ", 5400)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "soon", "-5m", "0", "nan", "inf", "1d", "1e999h"])
def test_durations_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget is '.*', but a duration such as 90s, 10m or 2h is expected"):
        parse_duration(text, "--budget")
