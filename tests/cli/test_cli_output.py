"""Where the command line writes: devices, pipes, closed stdout, plans of other models; and how signals end a search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import complaint, run
from models import tiny_model
from saved import PLAN, save_model

from selfspec import Plan, SkipSet
from selfspec.cli import _as_typed
from selfspec.errors import printable
from selfspec.plan.draft_spec import SubVocabulary
from selfspec.plan.provenance import ModelIdentity

HOSTILE = "\x1b]0;title\x07\n\r\x9b31m"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)  # prices may be rough


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return PLAN.save(tmp_path / "plan.json")


@pytest.fixture
def search(model_dir: Path, tmp_path: Path) -> tuple[object, ...]:
    """A short search, without --out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo more\nthree\nand four\nfive\n")
    options = ("--prompts", prompts, "--trials", 2, "--gamma-max", 1, "--new-tokens", 5, "--draft", "skip")
    return ("search", model_dir, *options, "--storage", tmp_path / "kept.db")


def command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The installed command, in a process of its own."""
    start = "import sys; from selfspec.cli import main; sys.argv[0] = 'selfspec'; main()"
    return subprocess.Popen([sys.executable, "-c", start, *map(str, arguments)], text=True, **options)


# --- What --out may name ---


def test_a_plan_is_written_into_a_pipe(search: tuple[object, ...], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    result = run(*search, "--out", pipe)
    assert result.exit_code == 0, result.output
    assert Plan.from_json(os.read(reader, 2**16).decode()).model is not None
    os.close(reader)
    assert pipe.is_fifo()


def test_a_report_is_written_into_a_pipe_and_follows_a_link(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    assert run("report", plan_file, "--out", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page.html").read_text().endswith("</html>")
    os.mkfifo(tmp_path / "pipe")
    assert "nothing reads this pipe" in complaint("report", plan_file, "--out", tmp_path / "pipe")


def test_a_report_on_stdout_is_all_that_stdout_gets(plan_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "page.html").open("w") as out:
        process = command("report", plan_file, "--out", "/dev/stdout", stdout=out, stderr=subprocess.PIPE)
        _, err = process.communicate()
    assert process.returncode == 0, err
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert err == "wrote /dev/stdout\n"


@pytest.mark.parametrize("out", ["none/plan.json", "file/plan.json"])
def test_what_cannot_be_written_is_said_before_any_work(
    out: str, plan_file: Path, search: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("selfspec.huggingface.loading.load", None)
    monkeypatch.setattr("selfspec_search.report.read_source", None)
    profile = ("profile", "demo")
    for arguments in (search, ("demo",), profile, ("report", plan_file)):
        assert "there is no directory" in complaint(*arguments, "--out", tmp_path / out)
    assert "there is no directory" in complaint(*profile, "--plot", tmp_path / f"{out}.png")
    generate = ("generate", "demo", "--plan", plan_file, "--prompt", "x")
    assert "there is no directory" in complaint(*generate, "--stats", tmp_path / out)
    assert "is no writable directory" in complaint("report", plan_file, "--png", tmp_path / "file" / "figures")


# --- Plans that are there already ---


@pytest.mark.parametrize("there", ["another config", "another family", "no plan", "damaged plan"])
def test_a_search_overwrites_only_plans_for_its_model(
    there: str, search: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    if there.startswith("another"):
        model = tiny_model("llama" if there == "another config" else "qwen2")
        Plan(skip_set=SkipSet(attn={1}), gamma=2, model=ModelIdentity.of(model.config)).save(out)
    else:
        out.write_text("my notes" if there == "no plan" else '{"selfspec_version": 2, "gamma": -1}')
    before = out.read_text()
    with monkeypatch.context() as patched:
        patched.setattr("selfspec_search.search", None)
        message = complaint(*search, "--out", out)
    assert "give another --out, or --force" in message
    assert (there in message) == (there == "another config")
    assert out.read_text() == before
    assert run(*search, "--out", out, "--force").exit_code == 0
    assert Plan.from_pretrained(out).model is not None


def test_a_search_overwrites_its_own_plan_and_an_empty_file(search: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    out.touch()
    for _ in range(2):
        assert run(*search, "--out", out).exit_code == 0
    assert Plan.from_pretrained(out).model is not None


# --- Closed and broken streams ---


@pytest.mark.slow
def test_a_closed_stdout_and_a_closed_stderr_are_no_problem(model_dir: Path, plan_file: Path, tmp_path: Path) -> None:
    generate = ("generate", model_dir, "--plan", plan_file, "--prompt", "x", "--max-new-tokens", 3)
    for closed in (1, 2):
        stats = tmp_path / f"stats{closed}.json"
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = command(*generate, "--stats", stats, **streams, preexec_fn=lambda: os.close(closed))  # noqa: B023
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert (out == "", err == "") == (closed == 1, closed == 2)
        assert stats.read_text().startswith("{")


@pytest.mark.parametrize("asked", ["text", "help", "report"])
def test_a_reader_that_went_away_ends_the_command_quietly(asked: str, model_dir: Path, plan_file: Path) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "text": ("generate", model_dir, "--plan", plan_file, "--prompt", "x"),
        "help": ("search", "--help"),
        "report": ("report", plan_file, "--out", "/dev/stdout"),
    }
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*arguments[asked], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate()
    if asked == "report":  # what was asked for is the file
        assert (process.returncode, err.count("\n")) == (1, 1)
        assert err.startswith("error: cannot write /dev/stdout")
    else:
        assert (process.returncode, err) == (141, "")


@pytest.mark.slow
def test_a_full_disk_takes_one_line(model_dir: Path, plan_file: Path) -> None:
    generate = ("generate", model_dir, "--plan", plan_file, "--prompt", "x", "--max-new-tokens", 3)
    with open("/dev/full", "w") as full:
        process = command(*generate, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: cannot write to stdout: No space left on device"
    assert "Traceback" not in err


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_trials_ends_a_search_with_one_line(
    number: signal.Signals, search: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", lambda *_, **__: signal.raise_signal(number))
    usual = signal.getsignal(signal.SIGTERM)
    result = run(*search, "--out", tmp_path / "x.json")
    assert result.exit_code == 128 + number
    assert result.stderr == (
        f"interrupted, and no plan was written; trials that ended are kept in {tmp_path}/kept.db: "
        "give the same command again to go on\n"
    )
    assert not (tmp_path / "x.json").exists()
    assert signal.getsignal(signal.SIGTERM) is usual


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_trials_ends_them_and_a_plan_is_written(
    number: signal.Signals, search: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfspec_search.study.study import Study

    usual, tried = Study._try, []

    def interrupt(self: Study, draft_spec: Any) -> None:
        usual(self, draft_spec)
        tried.append(draft_spec)
        signal.raise_signal(number)

    monkeypatch.setattr(Study, "_try", interrupt)
    result = run(*search, "--trials", 9, "--out", tmp_path / "x.json")
    assert result.exit_code == 128 + number, result.output
    assert len(tried) == 1
    assert "then interrupted" in result.stdout
    assert Plan.from_pretrained(tmp_path / "x.json").model is not None


# --- One style of errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frob",), "error: no such command 'frob'; see 'selfspec --help'"),
        (("generate", "m", "--frob"), "error: no such option: --frob; see 'selfspec generate --help'"),
        (("generate", "m", "--top-k", "x"), "error: invalid value for '--top-k': "),
        (("search", "m", "--out", "p.json"), "error: invalid value: give --prompts FILE: 32 or more prompts"),
        (("search", "m"), "error: missing option '--out'; see 'selfspec search --help'"),
        (("bench",), "error: missing argument 'MODEL'; see 'selfspec bench --help'"),
    ],
)
def test_usage_errors_are_one_line_like_all_errors(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.lower().startswith(message.lower())


@pytest.mark.parametrize("where", ["command", "option", "model", "plan", "value", "prompts"])
def test_control_characters_of_arguments_never_reach_the_terminal(where: str, plan_file: Path) -> None:
    generate = ("generate", "demo", "--plan", plan_file, "--prompt")
    arguments: dict[str, tuple[object, ...]] = {
        "command": (HOSTILE,),
        "option": (*generate, "x", "--" + HOSTILE),
        "model": ("generate", HOSTILE, "--plan", plan_file, "--prompt", "x"),
        "plan": ("generate", "demo", "--plan", HOSTILE, "--prompt", "x"),
        "value": (*generate, "x", "--dtype", HOSTILE),
        "prompts": ("generate", "demo", "--plan", plan_file, "--prompt-file", HOSTILE),
    }
    result = run(*arguments[where])
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    assert printable(result.stderr[:-1]) == result.stderr[:-1]


def test_settings_are_named_as_they_were_typed(model_dir: Path, tmp_path: Path) -> None:
    names = ["draft_memory", "max_draft_cost", "rows"]
    assert _as_typed("raise max_draft_cost or draft_memory, or rows", names) == (
        "raise --max-draft-cost or --draft-memory, or rows"
    )
    assert _as_typed("there is no 'draft_memory', draft_memory/x or my.draft_memory", names) == (
        "there is no 'draft_memory', draft_memory/x or my.draft_memory"
    )
    vocabulary = SubVocabulary.of(range(100), 257).code
    plan = Plan(skip_set=SkipSet(), draft_vocabulary=vocabulary, gamma=2).save(tmp_path / "trimmed.json")
    generate = ("generate", model_dir, "--plan", plan, "--prompt", "x")
    assert "--draft-memory allows" in run(*generate, "--draft-memory", 1).stderr
