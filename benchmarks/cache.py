"""Cache: whoever measures a search leaves aside what earlier ones kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from selfspec_search.replay.text_cache import CACHE_VARIABLE


@contextmanager
def no_cached_texts() -> Iterator[None]:
    """A search that writes its texts itself, whatever an earlier one left on the disk."""
    before = os.environ.get(CACHE_VARIABLE)
    with TemporaryDirectory() as empty:
        os.environ[CACHE_VARIABLE] = empty
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            if before is not None:
                os.environ[CACHE_VARIABLE] = before
