"""Sizes in bytes, as people write them."""

from __future__ import annotations

import pytest

from selfspec.errors import InputError
from selfspec.utils.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 2**29), ("4G", 2**32), ("1.5GiB", 3 * 2**29), ("77", 77), ("2kb", 2048)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-4G", "0", "4Q", "infM"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a size such as 512M or 4G is expected"):
        parse_size(text)
