"""The search as users run it: from the command line, on several machines, killed and interrupted at any moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import complaint
from optuna.trial import FrozenTrial, TrialState
from postgres import Server
from safetensors.torch import load_file, save_file
from saved import save_model
from selfspec_search.storage.open import open_storage
from selfspec_search.storage.study_store import FINISHED, StoredStudy, load_study
from selfspec_search.storage.trial import OWNER

from selfspec import Plan

pytestmark = pytest.mark.slow

TRIALS = 17
DEADLINE = 600.0
"""Seconds: a test gives up after this time."""
SELFSPEC = [sys.executable, "-c", "from selfspec.cli import main; main()"]
HELD = """
import os, sys, time
from pathlib import Path
from selfspec.cli import main
from selfspec_search.study.study import Study

hold, after, ended, replay = Path(sys.argv.pop(1)) / str(os.getpid()), int(sys.argv.pop(1)), 0, Study._replay

def replay_or_wait(*given):
    global ended
    if ended == after:
        hold.touch()
        while hold.exists():
            time.sleep(0.02)
    replay(*given)
    ended += 1

Study._replay = replay_or_wait
main()
"""
"""A search that runs `after` trials and stops in the next trial while a file named after its process exists.

What a test sees during this trial does not depend on the machine's speed."""
STUDY = "together"
WAITS = "waiting for the worker that writes texts and measures the profile\n"


@dataclass
class Bench:
    """A directory with a model and prompts, and search processes, which are killed when the tests end."""

    place: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.place / "cache"

    def hold(self, process: subprocess.Popen[str]) -> Path:
        return self.place / "holds" / str(process.pid)

    def command(self, *options: object, **changed: object) -> list[object]:
        """A search; `changed` gives other values for settings that a study's workers must agree on."""
        agreed = {"prompts": self.place / "prompts.txt", "gamma_max": 2, "new_tokens": 17, "trials": TRIALS} | changed
        model = agreed.pop("model", self.place / "model")
        named = [part for name, value in agreed.items() for part in (f"--{name.replace('_', '-')}", value)]
        return ["search", model, *named, *options]

    def search(self, *options: object, hold_after: int | None = None) -> subprocess.Popen[str]:
        """Start a search in a process of its own."""
        held = [sys.executable, "-c", HELD, self.place / "holds", hold_after]
        process = subprocess.Popen(
            [*map(str, (*(SELFSPEC if hold_after is None else held), *self.command(*options)))],
            env=os.environ | {"OMP_NUM_THREADS": "1", "SELFSPEC_CACHE": str(self.cache), "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_listen_to_ctrl_c,
        )
        self.started.append(process)
        return process


def _listen_to_ctrl_c() -> None:
    """Tests that are started in the background, and their children, ignore ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("together"))
    save_model(bench.place / "model")
    (bench.place / "holds").mkdir()
    (bench.place / "prompts.txt").write_text("".join(f"prompt {number} of some\n" for number in range(12)))
    yield bench
    for process in bench.started:
        process.kill()
        process.communicate()


def printed(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, err
    assert err in ("", WAITS)
    return out


def all_trials(storage: str) -> list[FrozenTrial]:
    """All trials of the study, in any state."""
    opened = open_storage(storage, on_notice=lambda _: None, create=False)
    try:
        return opened.do(lambda raw: raw.get_all_trials(raw.get_study_id_from_name(STUDY)))
    finally:
        opened.close()


def await_hold(bench: Bench, worker: subprocess.Popen[str]) -> None:
    """Wait until a worker is in the trial that `hold_after` stops."""
    deadline = time.monotonic() + DEADLINE
    while not bench.hold(worker).exists():
        assert worker.poll() is None, worker.communicate()[1]
        assert time.monotonic() < deadline, "the worker never began that trial"
        time.sleep(0.05)


def kill(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()


def contents(study: StoredStudy) -> dict[int, str]:
    """The stored data of each finished trial as text, by number."""
    return {t.number: json.dumps([str(t.draft_spec), t.value, t.record], sort_keys=True) for t in study.trials}


def assert_lossless(out: str) -> None:
    """Assert that no confirmed plan printed a text that differs from the plain model's."""
    header, *rows = out[: out.index("\nsearch ")].splitlines()
    assert header.endswith("differing texts")
    differing = [row[header.index("differing texts") :].strip() for row in rows]
    assert len(counts := [texts for texts in differing if texts]) > 1  # a long plan takes two lines, one with a count
    assert set(counts) == {"0"}, out


def test_of_three_workers_on_one_database_the_creator_is_killed_and_the_others_finish_all_trials(
    bench: Bench, postgres: Server
) -> None:
    storage = postgres.new_database().replace("postgresql:", "postgresql+psycopg:")
    outs = [bench.place / f"worker {number}.json" for number in range(3)]
    workers = [bench.search("--out", out, "--storage", storage, "--study", STUDY, hold_after=1) for out in outs]
    for worker in workers:
        await_hold(bench, worker)
    begun = all_trials(storage)
    creator = begun[0].system_attrs[OWNER]["pid"]
    (lost,) = [t for t in begun if t.state == TrialState.RUNNING and t.system_attrs[OWNER]["pid"] == creator]
    workers.sort(key=lambda worker: worker.pid != creator)
    kill(workers[0])
    for worker in workers[1:]:
        bench.hold(worker).unlink()
    for worker in workers[1:]:
        assert_lossless(printed(worker))

    study = load_study(storage, STUDY)
    assert TRIALS <= len(study.trials) <= TRIALS + 1  # both may be in their last trial
    assert Counter(trial.draft_spec for trial in study.trials).most_common(1)[0][1] == 1
    assert all_trials(storage)[lost.number].state == TrialState.FAIL
    assert {trial.record["worker"].partition(":")[2] for trial in study.trials} == {str(w.pid) for w in workers}

    priced = json.loads(study.blobs["profile"])
    plans = [Plan.from_pretrained(out) for out in outs if out.exists()]
    assert len(plans) == 2
    for plan in plans:
        assert plan.provenance is not None
        assert (plan.provenance.study, plan.provenance.trials >= TRIALS) == (STUDY, True)
        conditions = plan.provenance.conditions
        assert all(getattr(conditions, name) == priced[name] for name in ("device", "dtype", "rows", "compiled"))


@dataclass(frozen=True)
class Story:
    """One command, run three times: the first search was killed, the second interrupted, and the third finished."""

    storage: str
    studies: list[StoredStudy]
    interrupted: str
    finished: str
    plans: list[Plan]
    new_texts: list[Path]


@pytest.fixture(scope="module")
def story(bench: Bench) -> Story:
    """Run once: each of the three searches takes many seconds."""
    out = bench.place / "plan.json"
    storage = str(out.with_suffix(".db"))
    command = ("--out", out, "--study", STUDY)
    first = bench.search(*command, hold_after=2)
    await_hold(bench, first)
    kill(first)
    studies, plans = [load_study(storage, STUDY)], []
    assert not out.exists()
    for text in (bench.cache / "texts").iterdir():
        text.unlink()  # so that texts come from the study, or are written again

    second = bench.search(*command, hold_after=1)
    await_hold(bench, second)
    second.send_signal(signal.SIGINT)
    interrupted = printed(second, code=130)
    studies.append(load_study(storage, STUDY))
    plans.append(Plan.from_pretrained(out))

    finished = printed(bench.search(*command))
    studies.append(load_study(storage, STUDY))
    plans.append(Plan.from_pretrained(out))
    return Story(storage, studies, interrupted, finished, plans, list((bench.cache / "texts").iterdir()))


@pytest.mark.xdist_group("story")
def test_the_same_command_goes_on_after_a_kill_and_after_ctrl_c_until_exactly_all_trials_are_finished(
    story: Story,
) -> None:
    killed, interrupted, complete = map(contents, story.studies)
    assert 2 <= len(killed) < len(interrupted) < len(complete) == TRIALS
    assert killed.items() <= interrupted.items() <= complete.items()
    assert len({trial.draft_spec for trial in story.studies[-1].trials}) == TRIALS
    assert {trial.state for trial in all_trials(story.storage)} <= {*FINISHED, TrialState.FAIL}


@pytest.mark.xdist_group("story")
def test_a_search_that_goes_on_neither_writes_texts_nor_measures_a_profile_again(story: Story) -> None:
    first, *later = [{key: study.blobs[key] for key in ("texts", "profile")} for study in story.studies]
    assert all(blobs == first for blobs in later)
    for out in (story.interrupted, story.finished):
        assert "trying drafts" in out
        assert "writing texts" not in out
        assert "timing passes" not in out
    assert not story.new_texts


@pytest.mark.xdist_group("story")
def test_ctrl_c_in_the_trials_confirms_and_writes_the_best_so_far(story: Story) -> None:
    assert "then interrupted" in story.interrupted
    assert_lossless(story.interrupted)
    assert_lossless(story.finished)
    trials = [plan.provenance.trials for plan in story.plans if plan.provenance is not None]
    assert trials == [len(study.trials) for study in story.studies[1:]]


@pytest.mark.xdist_group("story")
def test_a_worker_that_would_mix_is_refused_by_what_differs(story: Story, bench: Bench) -> None:
    heavier = bench.place / "other"
    save_model(heavier)
    weights = load_file(heavier / "model.safetensors")
    weights["lm_head.weight"] *= 1.5
    save_file(weights, heavier / "model.safetensors", metadata={"format": "pt"})
    fewer = bench.place / "fewer.txt"
    fewer.write_text("another prompt\nand one more\n")
    join = ("--storage", story.storage, "--study", STUDY, "--out", bench.place / "mixed.json")
    refused: list[tuple[dict[str, object], str]] = [
        ({"gamma_max": 3}, r"with --gamma-max 2 \(here 3\); choose another --study"),
        ({"prompts": fewer}, r"with calibration 9 \(here 1\), prompts \w+ \(here \w+\); choose"),
        ({"model": heavier}, r"with weights \w+ \(here \w+\); choose another --study"),
    ]
    for changed, expected in refused:
        assert re.search(expected, complaint(*bench.command(*join, **changed)))
    assert contents(load_study(story.storage, STUDY)) == contents(story.studies[-1])
    assert not (bench.place / "mixed.json").exists()


def test_a_storage_or_plan_that_cannot_be_written_takes_one_line_and_loses_nothing(bench: Bench) -> None:
    out, a_file = bench.place / "kept.json", bench.place / "file"
    a_file.write_text("not a directory")
    out.write_text("an earlier plan")
    assert "cannot write" in complaint(*bench.command("--out", a_file / "plan.json"))
    search = [*bench.command("--out", out), "--force"]
    assert "there is no directory" in complaint(*search, "--storage", a_file / "plan.db")
    away = complaint(*search, "--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "cannot be used" in away
    assert "secret" not in away
    assert (out.read_text(), a_file.read_text()) == ("an earlier plan", "not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_protected_directory_takes_one_line(bench: Bench, tmp_path: Path) -> None:
    protected = tmp_path / "protected"
    protected.mkdir(mode=0o555)
    assert "choose a writable directory" in complaint(*bench.command("--out", protected / "plan.json"))
    search = bench.command("--out", tmp_path / "plan.json")
    assert "is protected" in complaint(*search, "--storage", protected / "plan.db")
    assert list(protected.iterdir()) == []
