"""CacheMemory: allocates, grows, shares and frees the KV cache of a runtime and its row buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selfspec.errors import OutOfMemoryError, is_out_of_memory
from selfspec.runtime.forward_pass import Backend
from selfspec.runtime.kv_cache import KVCache
from selfspec.runtime.model_views import ModelViews
from selfspec.runtime.row_buffers import RowBuffers

RECENT = 8
"""Sizes: the latest needs of requests, which decide whether a large cache is kept."""
MOST_KEPT = 4
"""Ratio: the largest cache that is kept, to the most slots that a recent request needed."""


class CacheMemory:
    """The cache of both views and the row buffers, as large as recent requests needed.

    Args:
        views: returns the views that share the cache.
        forget: drops compiled passes and captured graphs, which hold the addresses of the cache.

    Attributes:
        cache: the cache; None before the first `reserve`, and after memory did not suffice.
        row_buffers: buffers of as many rows, for captured rounds.
    """

    row_buffers: RowBuffers

    def __init__(self, views: Callable[[], ModelViews], forget: Callable[[], None]) -> None:
        self._views, self._forget = views, forget
        self.cache: KVCache | None = None
        self._needed: deque[int] = deque(maxlen=RECENT)  # slots that requests of the cache's rows needed

    def reserve(self, rows: int, slots: int, backend: Backend) -> None:
        """Empty the cache, and make room for `slots` tokens in each of `rows` rows.

        A cache that is large enough is kept, unless it is more than `MOST_KEPT` times as large as the last `RECENT`
        needs.

        Raises:
            OutOfMemoryError: memory does not suffice.
        """
        cache = self.cache
        if cache is None or cache.rows != rows:
            self._needed.clear()
        self._needed.append(slots)
        most = KVCache.bucketed(max(self._needed))
        if cache is not None and cache.rows == rows and slots <= cache.slots <= MOST_KEPT * most:
            cache.reset()
            return
        del cache  # freed before the next cache is allocated
        self.free()
        with _naming(rows, most):
            self.row_buffers = RowBuffers(rows, most, self._views().model.device)
            self.cache = self._views().new_cache(rows, most, backend)

    def grow(self, slots: int) -> None:
        """Make room for `slots` tokens in each row, and keep what the cache holds.

        Raises:
            OutOfMemoryError: memory does not suffice. The cache is lost.
        """
        cache, slots = self.cache, KVCache.bucketed(slots)
        assert cache is not None, "reserve a cache first"
        self.free()
        with _naming(cache.rows, slots):
            self.row_buffers.widen(slots)
            cache.grow(slots)
        self._needed.append(slots)
        self._attach(cache)

    def adopt(self, other: CacheMemory) -> None:
        """Share the cache of the same model's other views."""
        self.free()
        assert other.cache is not None, "reserve the other cache first"
        self.row_buffers = other.row_buffers
        self._attach(other.cache)

    def zero(self) -> None:
        """Zero the cache after an error."""
        if self.cache is not None:
            self.cache.zero()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Keep the cache from the views inside this context: modules that no longer run must not keep a cache alive."""
        self._views().detach()
        try:
            yield
        finally:
            if self.cache is not None:
                self._views().attach(self.cache)

    def free(self) -> None:
        """Drop every reference to the cache."""
        self.cache = None
        self._forget()
        self._views().detach()

    def _attach(self, cache: KVCache) -> None:
        self.cache = cache
        self._views().attach(cache)


@contextmanager
def _naming(rows: int, slots: int) -> Iterator[None]:
    """Name the cache that memory does not suffice for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        if not is_out_of_memory(error):
            raise
        shape = f"{rows} row{'s' * (rows != 1)} of {slots} tokens"
        raise OutOfMemoryError(
            f"memory does not suffice for a KV cache of {shape}; give fewer rows, a shorter prompt or a lower limit"
        ) from None
