"""What benchmark scripts share: timing, a budget's stages, cores and records."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from common import budget as budget_module
from common.budget import Budget, LeftOutError
from common.machine import one_core, usable
from common.record import Record, warn_if_dirty
from common.timing import FEWEST, WARM_UPS, Times, decode_seconds, take_turns
from rich.console import Console
from selfspec_search.replay.replay import threads_for

from selfspec import InputError
from selfspec.utils import statistics

CPU = torch.device("cpu")


class Clock:
    """Only a test moves this time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def decoder(self, start: float, per_token: float) -> Callable[[int], None]:
        def decode(n: int) -> None:
            self.now += start + per_token * n

        return decode


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(statistics, "perf_counter", clock)
    monkeypatch.setattr(budget_module, "perf_counter", clock)
    return clock


# --- Timing ---


def test_decoding_is_timed_without_what_comes_before_its_tokens(clock: Clock) -> None:
    decoders = {"plain": clock.decoder(5.0, 3.0), "ours": clock.decoder(11.0, 2.0)}
    seconds = decode_seconds(decoders, CPU, new_tokens=FEWEST + 7, repeats=3)
    assert seconds == {"plain": pytest.approx(3.0), "ours": pytest.approx(2.0)}
    runs = WARM_UPS + 3
    assert clock.now == pytest.approx(runs * (2 * (5.0 + 11.0) + (2 * FEWEST + 7) * (3.0 + 2.0)))


def test_decoding_that_takes_no_time_is_refused_and_not_reported(clock: Clock) -> None:
    with pytest.raises(InputError, match="plain took no longer for 11 tokens than for 2"):
        decode_seconds({"plain": clock.decoder(5.0, 0.0)}, CPU, new_tokens=11, repeats=3)


def test_a_ratio_of_times_is_taken_repeat_by_repeat() -> None:
    spread = Times((2.0, 9.0, 5.0)).over(Times((4.0, 3.0, 5.0)))
    assert (spread.value, spread.low, spread.high) == (1.0, 0.5, 3.0)  # of 0.5, 3 and 1
    assert Times((2.0, 9.0, 5.0)).median == 5.0


def test_calls_take_turns_after_a_stretch_that_is_not_timed(clock: Clock) -> None:
    called = list[str]()

    def call(name: str, seconds: float) -> None:
        called.append(name)
        clock.now += seconds

    calls = {"one": lambda: call("one", 3.0), "other": lambda: call("other", 0.5)}
    assert take_turns(calls, CPU, repeats=2, in_a_row=3) == {"one": Times((3.0, 3.0)), "other": Times((0.5, 0.5))}
    warm_up, first, second = called[:6], called[6:12], called[12:]
    assert warm_up == first == ["one"] * 3 + ["other"] * 3
    assert sorted(second) == sorted(first)


# --- Budget ---


def test_a_stage_that_the_time_left_is_not_enough_for_is_skipped_and_says_so(clock: Clock) -> None:
    budget = Budget(seconds=101)
    assert budget.run("one", 7, lambda: clock.decoder(60.0, 0.0)(1) or "done") == "done"
    assert budget.run("other", 43, lambda: "done") is None
    one, other = budget.stages
    assert (one.status, one.seconds, other.status) == ("done", 60, "skipped")
    assert other.reason == "it may take 43 s, and 41 s of 101 s are left; give a longer --budget"


def test_a_stage_is_expected_to_take_as_long_as_the_longest_of_its_kind(clock: Clock) -> None:
    budget = Budget(seconds=100)
    for seconds in (31, 17):
        budget.run(f"{seconds}", 1, lambda seconds=seconds: clock.decoder(seconds, 0)(1), kind="cell")
    budget.run("fits", 50, lambda: None, kind="cell")
    clock.now += 23  # of 52 that were left
    budget.run("does not", 1, lambda: None, kind="cell")
    assert [stage.status for stage in budget.stages] == ["done", "done", "done", "skipped"]
    assert "it may take 31 s, and 29 s" in budget.stages[-1].reason


def test_a_stage_that_fails_leaves_the_others_their_turn(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    budget = Budget(11, Console())
    budget.run("broken", 0, lambda: fail(RuntimeError("first line\nsecond")))
    budget.run("refused", 0, lambda: fail(InputError("no such model")))
    budget.run("left out", 0, lambda: fail(LeftOutError("too big")))
    budget.run("too large", 0, lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    assert budget.run("next", 0, lambda: 5) == 5
    printed = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["broken: failed", "refused: failed", "left out: skipped", "too large: skipped", "next: done"]
    assert [stage["reason"] for stage in budget.to_list()][::2] == ["RuntimeError: first line second", "too big", ""]


def test_a_mistake_in_the_code_is_not_taken_for_a_stage_s_failure() -> None:
    with pytest.raises(ZeroDivisionError):
        Budget(seconds=11).run("mistaken", 0, lambda: 1 // 0)


# --- The machine and the record ---


@pytest.mark.skipif(usable() < 2, reason="needs two cores, and a system that can keep a process to one")
def test_a_process_kept_to_one_core_is_so_in_every_thread_and_gets_the_others_back() -> None:
    def affinities() -> list[set[int]]:
        threads = (thread.submit(os.sched_getaffinity, 0).result() for thread in (older, newer))
        return [os.sched_getaffinity(0), *threads]

    before = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as older, ThreadPoolExecutor(1) as newer:
        assert older.submit(os.sched_getaffinity, 0).result() == before
        with one_core() as cores:
            inside, threads = affinities(), threads_for(CPU)
        assert affinities() == [before] * 3
    assert (cores, threads) == (1, 1)  # replay, which would take every core
    assert threads_for(CPU) == len(before)
    assert len(inside[0]) == 1
    assert inside[1:] == inside[:1] * 2


@pytest.mark.parametrize(("code", "warned"), [("8d26c5237a", False), ("8d26c5237a-dirty", True)])
def test_only_results_of_a_changed_tree_are_warned_of(
    code: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_dirty(code)
    assert ("8d26c5237a-dirty" in capsys.readouterr().err) == warned


def test_a_record_is_written_and_printed_as_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Namespace(out=tmp_path / "out.json", seed=3, model=Path("model"))
    result = Record("mine", options).end("cpu", figure=7)
    assert (result["benchmark"], result["figure"]) == ("mine", 7)
    assert result["settings"] == {"seed": 3, "model": Path("model")}
    written = json.loads((tmp_path / "out.json").read_text("utf8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == written
    assert written["settings"] == {"seed": 3, "model": "model"}
