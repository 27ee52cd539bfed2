"""One request at a time; waiting for a stream that nobody reads has an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from selfspec import SelfspecError
from selfspec.utils import request_lock
from selfspec.utils.request_lock import RequestLock


class Clock:
    """Time that passes only while somebody waits for the lock; `each_wait` sees each wait."""

    def __init__(self, lock: RequestLock, each_wait: Any = lambda count: None) -> None:
        self.now, self.waits, self._lock, self._each_wait = 0.0, [], lock._lock, each_wait

    def monotonic(self) -> float:
        return self.now

    def acquire(self, timeout: float) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        self.waits.append(timeout)
        self.now += timeout
        self._each_wait(len(self.waits))
        return False

    def release(self) -> None:
        self._lock.release()


@pytest.fixture
def lock() -> RequestLock:
    return RequestLock(patience=5)


def with_clock(lock: RequestLock, monkeypatch: pytest.MonkeyPatch, each_wait: Any = lambda count: None) -> Clock:
    clock = Clock(lock, each_wait)
    monkeypatch.setattr(lock, "_lock", clock)
    monkeypatch.setattr(request_lock, "monotonic", clock.monotonic)
    return clock


def stream(lock: RequestLock, tokens: int) -> Iterator[int]:
    with lock.held():
        for token in range(tokens):
            with lock.lent():
                yield token


def in_thread(work: Any) -> list[Any]:
    """What `work` returns, or the error that it raises, in another thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except SelfspecError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    return results


def hold(lock: RequestLock) -> str:
    with lock.held():
        return "held"


def test_waiting_for_a_stream_that_nobody_reads_ends_with_an_error(
    lock: RequestLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, abandoned = with_clock(lock, monkeypatch), stream(lock, 3)
    assert in_thread(lambda: next(abandoned)) == [0]  # a thread that ends, whose ident a later one may get
    (error,) = in_thread(lambda: hold(lock))
    assert "nobody has read the stream for 5 seconds; exhaust or close the stream" in str(error)
    assert clock.waits == [5]
    (error,) = in_thread(lambda: hold(lock))
    assert clock.waits == [5, 5], "a later request gives the reader the same time"
    abandoned.close()
    assert in_thread(lambda: hold(lock)) == ["held"]


def test_waiting_begins_anew_when_a_token_is_read(lock: RequestLock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = stream(lock, 4)

    def read_late(waits: int) -> None:
        clock.now -= 1  # just in time
        next(slow, None)

    clock = with_clock(lock, monkeypatch, read_late)
    next(slow)
    assert in_thread(lambda: hold(lock)) == ["held"]
    assert len(clock.waits) == 4


def test_a_request_at_work_is_waited_for_without_limit(lock: RequestLock, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(waits: int) -> None:
        if waits == 1000:
            context.__exit__(None, None, None)

    clock, context = with_clock(lock, monkeypatch, finish), lock.held()
    context.__enter__()
    assert in_thread(lambda: hold(lock)) == ["held"]
    assert len(clock.waits) == 1000
