"""The first hour on a GPU: stages keep their time, and what one wrote is kept when another fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_day
import pytest
from gpu_day import Stage, run, stages


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_keeps_its_log_and_its_result(tmp_path: Path) -> None:
    outcome = run(Stage(name="a, b", command=python("print('table'); print('{\"x\": 1}')"), minutes=1), tmp_path, 60)
    assert (outcome.status, outcome.said, outcome.result) == ("done", "table", {"x": 1})
    assert (tmp_path / "a-b.log").read_text() == 'table\n{"x": 1}\n'
    assert json.loads((tmp_path / "a-b.json").read_text())["result"] == {"x": 1}


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit('broken')", "failed", "broken"),
        ("import time; print('so far', flush=True); time.sleep(60)", "timed out", "so far"),
        ("", "done", ""),
    ],
)
def test_a_stage_that_fails_or_takes_too_long_is_named(
    code: str, status: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(Stage(name="one", command=python(code), minutes=1), tmp_path, 2.0)
    assert (outcome.status, outcome.said, outcome.result) == (status, said, None)
    assert said in capsys.readouterr().out or status == "done"


def test_later_stages_are_skipped_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, never = Stage(name="fast", command=python("print(1)"), minutes=1), Stage(name="never", command=[], minutes=1)
    monkeypatch.setattr(gpu_day, "stages", lambda model, toy: [fast, never])
    monkeypatch.setattr(gpu_day, "LEAST_SECONDS", 30.0)
    ticks = iter([0.0, 0.0, 0.0, 0.0, 100.0, 100.0])
    monkeypatch.setattr(gpu_day.time, "monotonic", lambda: next(ticks))
    result = gpu_day.main(["--toy", "--minutes", "1", "--folder", str(tmp_path)])
    assert [stage["status"] for stage in result["stages"]] == ["done", "skipped"]


def test_the_tests_come_first_and_a_real_model_only_if_given() -> None:
    names = [stage.name for stage in stages(None, toy=True)]
    assert names[0] == "tests"
    assert [stage.name for stage in stages("dir", toy=False)] == [*names[:2], "decode, real model", *names[2:]]


@pytest.mark.slow
def test_the_first_stages_run_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stages(None, toy=True)[:2]  # the tests of the other scripts run the others
    monkeypatch.setattr(gpu_day, "stages", lambda model, toy: first)
    result = gpu_day.main(["--toy", "--minutes", "8", "--folder", str(tmp_path)])
    assert [stage["status"] for stage in result["stages"]] == ["done"] * 2, result["stages"]
    assert json.loads((tmp_path / "decode-embedded-model.json").read_text())["result"]["benchmark"] == "decode"
