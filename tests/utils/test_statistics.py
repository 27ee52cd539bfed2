"""Interleaved timing and speed ratios."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from selfspec.utils.statistics import interleaved, median_seconds, medians, speed_ratio, timed_task


def logged(names: str, log: list[str], seconds: float = 0.5) -> dict[str, partial[float]]:
    def task(name: str) -> float:
        log.append(name)
        return seconds

    return {name: partial(task, name) for name in names}


def test_every_repeat_runs_every_task_once_and_the_order_rotates() -> None:
    log: list[str] = []
    seconds = interleaved(logged("abc", log), repeats=4, warmup=0)
    assert "".join(log) == "abcbcacababc"
    assert seconds == {name: [0.5] * 4 for name in "abc"}


def test_groups_run_in_order_and_rotate_independently() -> None:
    log: list[str] = []
    interleaved(logged("abcdef", log), repeats=2, warmup=0, group=3)
    assert "".join(log) == "abcefdbcafde"


def test_the_warm_up_does_not_count_and_repeats_are_reported() -> None:
    log: list[str] = []
    reports: list[tuple[int, int, int]] = []
    seconds = interleaved(
        logged("ab", log), repeats=3, warmup=2, on_repeat=lambda done, total: reports.append((done, total, len(log)))
    )
    assert "".join(log) == "aabbabbaab"
    assert [len(runs) for runs in seconds.values()] == [3, 3]
    assert reports == [(0, 3, 0), (1, 3, 6), (2, 3, 8), (3, 3, 10)]


def test_rare_tasks_run_in_the_first_repeat_and_every_fifth() -> None:
    seconds = interleaved(logged("ab", []), repeats=7, rare=lambda name: name == "b")
    assert [len(runs) for runs in seconds.values()] == [7, 2]


def test_a_budget_adds_repeats_up_to_four_times_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("selfspec.utils.statistics.perf_counter", lambda: next(clock))
    reports: list[int] = []
    few = interleaved(logged("a", []), repeats=2, budget=3.0, on_repeat=lambda done, total: reports.append(done))
    many = interleaved(logged("a", []), repeats=2, budget=999.0)
    assert (len(few["a"]), len(many["a"])) == (4, 8)  # the first look at the clock is after two repeats
    assert max(reports) == 2


def test_no_tasks_give_no_seconds() -> None:
    assert interleaved({}, repeats=3) == {}


def test_a_timed_task_returns_the_seconds_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("selfspec.utils.statistics.perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 3.0

    device = torch.device("cpu")
    assert timed_task(call, device, in_a_row=7)() == 3.0
    assert now[0] == 21.0
    assert median_seconds({"call": call}, device, repeats=3, in_a_row=2) == {"call": 3.0}


def test_medians_are_taken_per_task() -> None:
    assert medians({"a": [1.0, 9.0, 2.0], "b": [5.0]}) == {"a": 2.0, "b": 5.0}


def test_a_ratio_of_samples_counts_all_tokens_and_seconds() -> None:
    seconds, tokens = np.array([[[2.0], [4.0]], [[3.0], [3.0]]]), np.array([[[10.0], [20.0]], [[5.0], [5.0]]])
    assert speed_ratio(seconds, tokens).value == pytest.approx((30 / 6) / (10 / 6))
