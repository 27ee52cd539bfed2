from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import complaint, run
from models import FIRST_DROPPED, tiny_model
from saved import CONTEXT, PLAN, byte_tokenizer, save_model
from selfspec_search import load_study
from selfspec_search.study.study import Study
from transformers import AutoModelForCausalLM, T5Config
from typer.testing import CliRunner

from selfspec import Plan, SkipSet, __version__
from selfspec.cli import app
from selfspec.cli.search import PromptFiles, split
from selfspec.cli.terminal import progress_bar
from selfspec.cli.token_view import printable
from selfspec.huggingface.prompts import Prompt
from selfspec.plan.provenance import ModelIdentity
from selfspec.plan.round_costs import RoundCosts

PROMPT = "naïve"


@pytest.fixture(autouse=True)
def _few_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec_search.profile.profile.CYCLES", 1)  # prices may be rough
    monkeypatch.setattr("selfspec.cli.terminal.SECONDS_PER_LINE", 1e9)  # on a busy machine, too


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return PLAN.save(tmp_path / "plan.json")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo more\nthree\nand four\nfive\n")
    return path


def continuation(model_dir: Path, prompt: str, new_tokens: int) -> str:
    """What the plain model writes, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), byte_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    row = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# --- generate ---


def test_generate_writes_the_plain_models_text_to_stdout_and_one_line_of_figures_to_stderr(
    model_dir: Path, plan_file: Path
) -> None:
    result = run("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 40)
    assert result.exit_code == 0, result.output
    assert result.stdout == printable(continuation(model_dir, PROMPT, 40)) + "\n"
    assert result.stderr.count("\n") == 1
    assert "40 tokens in" in result.stderr
    assert "sdpa" in result.stderr


def test_generate_colours_what_was_drafted_on_a_terminal(
    model_dir: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 40)
    coloured = run(*arguments).stdout
    assert "\x1b[32m" in coloured
    Plan.none().save(plan_file)
    assert "\x1b[32m" not in run(*arguments).stdout


def test_generate_adapts_the_draft_length_unless_told_not_to(model_dir: Path, plan_file: Path) -> None:
    round_costs = RoundCosts(rows=1, draft_step=0.1, rounds=[1.0] * (PLAN.gamma + 3), agreement=[0.6])
    PLAN.model_copy(update={"round_costs": [round_costs]}).save(plan_file)
    arguments = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 40)
    adaptive, fixed = run(*arguments), run(*arguments, "--policy", "fixed")
    assert adaptive.stdout == fixed.stdout == printable(continuation(model_dir, PROMPT, 40)) + "\n"
    assert "drafted by" in adaptive.stderr
    assert "drafted by" not in fixed.stderr
    assert run(*arguments, "--policy", "eager").exit_code == 2


def test_generate_fills_the_context_by_default_and_no_more(model_dir: Path, plan_file: Path) -> None:
    result = run("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT)
    assert f"{CONTEXT - 6} tokens in" in result.stderr


def test_generate_serves_every_prompt_of_a_file_and_chats(model_dir: Path, plan_file: Path, prompt_file: Path) -> None:
    options = ("--plan", plan_file, "--max-new-tokens", 5)
    result = run("generate", model_dir, "--prompt-file", prompt_file, *options)
    assert result.stderr.count("5 tokens in") == 5
    chat = run("generate", model_dir, "--prompt", "hi", "--chat", *options)
    assert chat.stdout == printable(continuation(model_dir, "user: hi\nassistant: ", 5)) + "\n"


def test_sampling_repeats_itself_for_a_seed_and_differs_for_another(model_dir: Path, plan_file: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--seed", seed, "--max-new-tokens", 30)
        return run("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, *options).stdout

    assert sample(1) == sample(1) != sample(2)


def test_a_temperature_of_zero_is_greedy(model_dir: Path, plan_file: Path) -> None:
    arguments = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert run(*arguments, "--temperature", 0).stdout == run(*arguments).stdout


def test_generate_works_without_a_plan(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfspec.policy.without_plan.SECONDS", 0.05)
    arguments = ("generate", model_dir, "--prompt", PROMPT, "--max-new-tokens", 30)
    expected = printable(continuation(model_dir, PROMPT, 30)) + "\n"
    measured, lookup = run(*arguments), run(*arguments, "--lookup", 4)
    assert measured.stdout == lookup.stdout == expected
    assert "no plan was given, so passes were timed: " in measured.stderr
    assert "'selfspec search" in measured.stderr
    assert "no plan was given" not in lookup.stderr
    assert "--lookup goes without --plan" in complaint(*arguments, "--lookup", 4, "--plan", "plan.json")


def test_a_prompt_comes_from_standard_input(model_dir: Path, plan_file: Path) -> None:
    arguments = ["generate", str(model_dir), "--plan", str(plan_file), "--max-new-tokens", "9"]
    piped = CliRunner().invoke(app, arguments, input=PROMPT + "\n")
    assert piped.stdout == run(*arguments, "--prompt", PROMPT).stdout
    empty = CliRunner().invoke(app, arguments, input="")
    assert empty.exit_code == 1
    assert "error: the prompt is empty" in empty.stderr


def test_generate_ends_at_a_stop_text(model_dir: Path, plan_file: Path) -> None:
    arguments = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 40)
    whole = run(*arguments).stdout
    word = next(char for char in whole[2:] if char.isalpha())
    ended = run(*arguments, "--stop", word).stdout
    assert ended == whole[: whole.index(word) + 1] + "\n"


def test_a_repetition_penalty_needs_no_sampling_and_bounds_are_checked(model_dir: Path, plan_file: Path) -> None:
    arguments = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert run(*arguments, "--repetition-penalty", 5.0).stdout != run(*arguments).stdout
    assert run(*arguments, "--temperature", 0.9, "--min-p", 0.2).exit_code == 0
    assert "--min-p is 1.5" in complaint(*arguments, "--min-p", 1.5)
    assert "--repetition-penalty is 0.0" in complaint(*arguments, "--repetition-penalty", 0)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("searching") as report:
        report(1, 9, "trying drafts")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("selfspec.cli.terminal.SECONDS_PER_LINE", 0)
    for quiet, expected in ((False, "trying drafts, best 1.21x predicted: 3 of 9\n"), (True, "")):
        with progress_bar("searching", quiet=quiet) as report:
            report(3, 9, "trying drafts, best 1.21x predicted")
        assert capsys.readouterr().err == expected


def test_a_search_of_the_embedded_model_needs_no_prompts_and_others_say_what_to_give() -> None:
    calibration, held_out = PromptFiles().read("demo", 0)
    assert (len(calibration), len(held_out)) == (64, 32)
    with pytest.raises(typer.BadParameter, match=r"give --prompts FILE: 32 or more prompts"):
        PromptFiles().read("some/model", 0)


def test_control_characters_of_a_text_never_reach_the_terminal() -> None:
    assert printable("a\tb\n\x1b[31mc\x07\r\x9bd é") == "a\tb\n[31mcd é"


# --- bench ---


def test_bench_ends_with_one_line_of_json(model_dir: Path, plan_file: Path, prompt_file: Path) -> None:
    options = ("--plan", plan_file, "--prompts", prompt_file, "--new-tokens", 7, "--repeats", 2, "--json")
    result = run("bench", model_dir, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    *table, last = result.stdout.splitlines()
    data = json.loads(last)
    names = ["model.generate", "plain", "assistant_early_exit", "prompt_lookup", "selfspec"]
    assert [contender["name"] for contender in data["contenders"]] == names
    assert all(contender["differing_tokens"] == 0 for contender in data["contenders"])
    assert (data["prompts"], data["repeats"], data["new_tokens"]) == (5, 2, 7)
    assert (data["backend"], data["plan"]["gamma"]) == ("sdpa", 3)
    assert "bootstrap" in data["intervals"]
    assert "policy: fixed: the plan has no round costs" in table
    generate, *_, ours = data["contenders"]
    assert ours["policy"] == "fixed: the plan has no round costs"
    assert list(ours["choices"]) == ["layers 3"]
    assert len(ours["accepted_at"]) == len(ours["reached_at"]) == 3
    assert all(accepted <= reached for accepted, reached in zip(ours["accepted_at"], ours["reached_at"], strict=True))
    assert ours["reached_at"][0] > 0
    assert [generate[name] for name in ("policy", "choices", "accepted_at", "reached_at")] == [None] * 4
    for name in names:
        assert any(line.startswith(name) for line in table)


# --- search ---


def test_search_writes_a_plan_that_generate_takes(model_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    out = tmp_path / "found.json"
    options = ("--out", out, "--trials", 3, "--gamma-max", 2, "--new-tokens", 9, "--device", "cpu")
    result = run("search", model_dir, "--prompts", prompt_file, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f"wrote {out}" in result.stdout
    plan = Plan.from_pretrained(out)
    assert plan.model is not None
    assert plan.provenance is not None
    assert "measured" in result.stdout
    if plan.speculates:
        assert "by replay" in result.stdout
        assert "equal in all" in result.stdout
    assert run("generate", model_dir, "--plan", out, "--prompt", "x", "--max-new-tokens", 3).exit_code == 0


def test_search_splits_off_a_quarter_that_depends_on_the_seed_alone() -> None:
    prompts = [Prompt(text=str(number)) for number in range(17)]
    calibration, held_out = split(prompts, 3)
    assert len(held_out) == 4
    assert sorted([*calibration, *held_out], key=lambda prompt: int(prompt.text)) == prompts
    assert split(prompts, 3) == (calibration, held_out) != split(prompts, 4)


def test_search_finds_out_that_it_cannot_write_before_it_starts(tmp_path: Path, prompt_file: Path) -> None:
    message = complaint("search", "no-model", "--prompts", prompt_file, "--out", tmp_path / "none" / "plan.json")
    assert "there is no directory" in message


def test_a_search_that_fails_writes_nothing(model_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    search = ("search", model_dir, "--prompts", prompt_file, "--out", out)
    assert "--gamma-max is 65" in complaint(*search, "--gamma-max", 65)
    assert "with 200 new ones exceeds the model's context" in complaint(*search, "--new-tokens", 200)
    prompt_file.write_text("only one\n")
    assert "one prompt cannot be split" in complaint(*search)
    assert list(out.iterdir()) == []


def test_a_prompt_of_one_token_takes_one_line(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nx\nabc\n")
    search = ("search", model_dir, "--prompts", prompts, "--held-out", prompts, "--out", tmp_path / "x.json")
    assert "line 2 has 1 token, but at least 2 are needed" in complaint(*search, "--new-tokens", 5)


def test_a_storage_that_cannot_be_opened_takes_one_line(model_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    search = ("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "x.json", "--new-tokens", 5)
    assert "storage: 'frob' is not a database that a search can use" in complaint(*search, "--storage", "frob://x")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_ended_and_picks_again(
    model_dir: Path, tmp_path: Path, prompt_file: Path
) -> None:
    out = tmp_path / "found.json"
    short = ("--gamma-max", 2, "--new-tokens", 9, "--device", "cpu", "--no-lookup")
    search = ("search", model_dir, "--prompts", prompt_file, "--out", out, *short)
    assert run(*search, "--trials", 2).exit_code == 0
    again = run(*search, "--trials", 4, "--start-from", out, "--max-draft-cost", 1.0)
    assert again.exit_code == 0, again.output
    result = run(*search, "--trials", 4)
    assert "writing texts" not in result.stdout
    assert load_study(str(tmp_path / "found.db"), study_named_in(out)).trials[3].number > 0
    picked = run("search", model_dir, "--out", out, "--repick", "--rows", 2, "--study", study_named_in(out))
    assert picked.exit_code == 0, picked.output
    plan = Plan.from_pretrained(out)
    assert plan.provenance is not None
    assert plan.provenance.conditions.rows == 2


def study_named_in(plan: Path) -> str:
    provenance = Plan.from_pretrained(plan).provenance
    assert provenance is not None
    assert provenance.study is not None
    return provenance.study


def test_picking_again_needs_a_study(model_dir: Path, tmp_path: Path) -> None:
    repick = ("search", model_dir, "--out", tmp_path / "x.json", "--repick")
    assert "x.db" in complaint(*repick)
    assert not list(tmp_path.iterdir())


def test_picking_again_takes_texts_and_sampling_from_the_study(tmp_path: Path, prompt_file: Path) -> None:
    repick = ("search", "demo", "--out", tmp_path / "x.json", "--repick")
    for option in (("--prompts", prompt_file), ("--temperature", 0.7), ("--gamma-max", 4)):
        result = run(*repick, *option)
        assert result.exit_code == 2
        assert option[0] in result.output


def test_a_search_for_sampling_says_so_in_its_plan(model_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    out = tmp_path / "found.json"
    options = ("--trials", 2, "--gamma-max", 2, "--new-tokens", 9, "--temperature", 0.7, "--top-k", 9, "--seed", 3)
    result = run("search", model_dir, "--prompts", prompt_file, "--out", out, *options)
    assert result.exit_code == 0, result.output
    provenance = Plan.from_pretrained(out).provenance
    assert provenance is not None
    assert provenance.conditions.sampling == {"do_sample": True, "temperature": 0.7, "top_k": 9}


def test_ctrl_c_keeps_the_best_so_far_and_exits_with_130(
    model_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Study, skip_set: SkipSet) -> None:
        try_one(self, skip_set)
        raise KeyboardInterrupt  # before the study has learnt of it

    try_one = Study._try
    monkeypatch.setattr(Study, "_try", interrupt)
    out = tmp_path / "found.json"
    options = ("--trials", 9, "--gamma-max", 2, "--new-tokens", 9, "--quiet")
    result = run("search", model_dir, "--prompts", prompt_file, "--out", out, *options)
    assert result.exit_code == 130
    assert "then interrupted" in result.stdout
    assert Plan.from_pretrained(out).provenance is not None


def test_ctrl_c_before_there_is_a_plan_says_what_is_kept(
    model_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", interrupt)
    storage = f"sqlite:///{tmp_path}/kept.db"
    search = ("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "x.json", "--new-tokens", 9)
    result = run(*search, "--storage", storage)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        f"interrupted, and no plan was written; trials that ended are kept in {storage}: give the same command again "
        "to go on"
    ]
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("storage", ["plan", "sqlite:///{}/plan", "journal://{}/plan"])
def test_a_plan_is_not_written_over_its_trials(tmp_path: Path, prompt_file: Path, storage: str) -> None:
    place = storage.format(tmp_path) if "{" in storage else str(tmp_path / storage)
    search = ("search", "demo", "--prompts", prompt_file, "--out", tmp_path / "plan", "--storage", place)
    assert "where the trials would be kept too" in complaint(*search)
    default = ("search", "demo", "--prompts", prompt_file, "--out", tmp_path / "plan.db")
    assert "where the trials would be kept too" in complaint(*default)


def test_a_search_starts_from_no_other_models_plan(model_dir: Path, tmp_path: Path, prompt_file: Path) -> None:
    other = Plan(skip_set=SkipSet(attn={1}), gamma=2, model=ModelIdentity.of(tiny_model("qwen2").config))
    other.save(tmp_path / "other.json")
    search = ("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "x.json", "--new-tokens", 9)
    assert "qwen2" in complaint(*search, "--start-from", tmp_path / "other.json")


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_does_not_suffice_takes_one_line(
    model_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("selfspec_search.confirm.plan_writer.measure", fail)
    search = ("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "x.json", "--new-tokens", 9)
    assert complaint(*search).endswith("try fewer --rows, a smaller --dtype or a smaller --memory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "1K"), "a memory budget of 1 KiB is too small"),
        (("--memory", "lots"), "--memory is 'lots', but a size such as 512M or 4G is expected"),
        (("--seed", -1), "--seed is -1, but it must be between 0 and 4294967295"),
        (("--draft-memory", "0"), "--draft-memory is '0', but a size such as 512M or 4G is expected"),
        (("--lookup-max", 3, "--no-lookup"), "--lookup-max is 3, but prompt lookup takes no part"),
        (("--rows", 0), "--rows is 0, but it must be at least 1"),
        (("--more-rows", 0), "--more-rows holds 0, but there is at least 1 row"),
        (("--max-draft-cost", 2), "--max-draft-cost is 2"),
        (("--temperature", -1), "--temperature is -1"),
        (("--timeout", "nan"), "--timeout is nan seconds, but it must be more than 0"),
        (("--start-from", "none.json"), "no plan at none.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_search_options_that_make_no_sense_take_one_line(
    model_dir: Path, tmp_path: Path, prompt_file: Path, options: tuple[object, ...], message: str
) -> None:
    search = ("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "x.json", "--new-tokens", 5)
    assert message in complaint(*search, "--gamma-max", 1, *options)
    assert not (tmp_path / "x.json").exists()


# --- demo ---


def test_demo_searches_races_and_measures(
    model_dir: Path, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfspec.demo.model_dir", lambda: model_dir)
    monkeypatch.setattr("selfspec.demo.calibration_prompts", lambda: prompt_file)
    monkeypatch.setattr("selfspec.demo.held_out_prompts", lambda: prompt_file)
    monkeypatch.setattr("selfspec.cli.demo.NEW_TOKENS", 9)
    monkeypatch.setattr("selfspec.cli.demo.REPEATS", 1)
    result = run("demo", "--trials", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for part in ("1. Search", "2. Decode", "3. Measure", "plain: 9 tokens in", "selfspec: 9 tokens in"):
        assert part in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("model.generate", "selfspec "))]
    assert [(row[0], row[-1]) for row in rows] == [("model.generate", "0"), ("selfspec", "0")]  # differing tokens
    assert Plan.from_pretrained(tmp_path).model is not None


# --- Bad input: one clear line, exit code 1 ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no plan at"),
        ("{", "is not JSON"),
        ("{}", "is not a selfspec plan"),
        ('{"selfspec_version": 2, "skip_set": {"attn": [1]}, "gamma": 2, "gama": 3}', "unknown key 'gama'"),
        (
            '{"selfspec_version": 2, "skip_set": {"attn": [40]}, "gamma": 2}',
            "attn layer 40, but this model has 7 (0..6)",
        ),
        ('{"selfspec_version": 9, "skip_set": {}, "gamma": 2}', "this selfspec reads 1 and 2"),
    ],
)
def test_a_bad_plan_takes_one_line(
    model_dir: Path, plan_file: Path, prompt_file: Path, content: str | None, expected: str
) -> None:
    plan_file.unlink()
    if content is not None:
        plan_file.write_text(content)
    assert expected in complaint("generate", model_dir, "--plan", plan_file, "--prompt", "x")
    bench = ("bench", model_dir, "--plan", plan_file, "--prompts", prompt_file, "--new-tokens", 3)
    assert expected in complaint(*bench)


def test_a_plan_for_another_model_takes_one_line(model_dir: Path, plan_file: Path) -> None:
    other = ModelIdentity(model_type="llama", num_layers=7, fingerprint="0123456789abcdef")
    Plan(skip_set=FIRST_DROPPED, gamma=2, model=other).save(plan_file)
    assert "another config" in complaint("generate", model_dir, "--plan", plan_file, "--prompt", "x")
    Plan(skip_set=SkipSet(), gamma=2, model=other.model_copy(update={"num_layers": 9})).save(plan_file)
    assert "llama with 9 layers" in complaint("generate", model_dir, "--plan", plan_file, "--prompt", "x")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 98], f"has 98 tokens, but the model's context is {CONTEXT}"),
        (["--prompt", "x" * 97], f"exceeds the model's context of {CONTEXT}"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0, but it must be at least 1"),
        (["--prompt", "x", "--max-new-tokens", "97"], f"exceeds the model's context of {CONTEXT}"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature is -1.0"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--prompt", "x", "--top-k", "0"], "--top-k is 0"),
        (["--prompt", "x", "--backend", "frob"], "no attention backend is called 'frob'"),
        (["--prompt", "x", "--device", "frob"], "device 'frob' cannot be used"),
        (["--prompt", "x", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["--prompt-file", "no-such-file.txt"], "no prompt file at no-such-file.txt"),
    ],
)
def test_a_bad_request_takes_one_line(model_dir: Path, plan_file: Path, options: list[str], expected: str) -> None:
    assert expected in complaint("generate", model_dir, "--plan", plan_file, *options)


def test_prompt_files_that_hold_nothing_useful_take_one_line(model_dir: Path, plan_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for content, expected in (("", "is empty"), ("{}", "line 1 must be an object"), ('{"prompt": ""}', "is empty")):
        path.write_text(content)
        assert expected in complaint("bench", model_dir, "--plan", plan_file, "--prompts", path)
        assert expected in complaint("search", model_dir, "--prompts", path, "--out", tmp_path / "found.json")
        assert expected in complaint("generate", model_dir, "--plan", plan_file, "--prompt-file", path)
    assert not (tmp_path / "found.json").exists()


def test_bench_and_search_need_something_to_do(model_dir: Path, plan_file: Path, prompt_file: Path) -> None:
    bench = ("bench", model_dir, "--plan", plan_file, "--prompts", prompt_file)
    assert "--new-tokens is 0" in complaint(*bench, "--new-tokens", 0)
    assert "--repeats is 0" in complaint(*bench, "--repeats", 0)
    search = ("search", model_dir, "--prompts", prompt_file, "--out", plan_file)
    assert "--trials is 0" in complaint(*search, "--trials", 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (T5Config().to_dict(), "'t5' is an encoder-decoder model"),
        ({"model_type": "gpt_neox"}, "model type 'gpt_neox' is not supported"),
        ({"model_type": "frobnicator"}, "frobnicator"),
    ],
)
def test_a_model_that_cannot_be_served_takes_one_line(
    tmp_path: Path, plan_file: Path, prompt_file: Path, config: dict[str, Any], expected: str
) -> None:
    model_dir = save_model(tmp_path / "model")
    (model_dir / "config.json").write_text(json.dumps(config))
    assert expected in complaint("generate", model_dir, "--plan", plan_file, "--prompt", "x")
    assert expected in complaint("bench", model_dir, "--plan", plan_file, "--prompts", prompt_file)
    assert expected in complaint("search", model_dir, "--prompts", prompt_file, "--out", tmp_path / "found.json")


def test_a_directory_without_weights_and_a_wrong_tokenizer_take_one_line(tmp_path: Path, plan_file: Path) -> None:
    small = save_model(tmp_path / "small", vocab_size=211)
    assert "vocabulary is 0..210" in complaint("generate", small, "--plan", plan_file, "--prompt", "x")
    (small / "model.safetensors").unlink()
    assert "has no weights" in complaint("generate", small, "--plan", plan_file, "--prompt", "x")


def test_a_nan_in_the_logits_takes_one_line(tmp_path: Path, plan_file: Path) -> None:
    model_dir = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.lm_head.weight[9] = float("nan")
    model.save_pretrained(model_dir)
    result = run("generate", model_dir, "--plan", plan_file, "--prompt", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


# --- The command line itself ---


def test_usage_errors_exit_with_2(model_dir: Path, plan_file: Path) -> None:
    assert run("frob").exit_code == 2
    assert run("search", model_dir, "--out", "y").exit_code == 2
    assert run("generate", model_dir, "--plan", plan_file, "--prompt", "x", "--prompt-file", "y").exit_code == 2
    for option in ("--sampler", "--draft"):
        result = run("search", model_dir, "--prompts", "x", "--out", "y", option, "best")
        assert result.exit_code == 2
        assert option in result.output


def test_help_names_every_command_and_the_version_is_the_packages() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("demo", "search", "generate", "bench"))
    for command in ("demo", "search", "generate", "bench"):
        assert run(command, "--help").exit_code == 0
    for command in ("generate", "bench"):
        words = run(command, "--help").stdout.replace("│", " ").split()
        assert "drafter and draft length follow the text" in " ".join(words)
    assert run("--version").stdout == f"selfspec {__version__}\n"


def test_the_help_waits_for_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "optuna", "scipy", "sqlalchemy", "matplotlib", "selfspec.plan.plan"]
    loaded = f"sys.exit(', '.join(sorted(set({heavy}) & set(sys.modules))) or None)"
    for arguments in (["--help"], ["search", "--help"]):
        check = f"import sys, selfspec.cli; selfspec.cli.app({arguments}, standalone_mode=False); {loaded}"
        assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


# --- A draft model ---


@pytest.fixture(scope="module")
def smaller_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "smaller", num_hidden_layers=7)


def test_generate_with_a_draft_model_writes_the_plain_models_text(model_dir: Path, smaller_dir: Path) -> None:
    options = ("--draft-model", smaller_dir, "--draft-gamma", 2, "--prompt", PROMPT, "--max-new-tokens", 40)
    result = run("generate", model_dir, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == printable(continuation(model_dir, PROMPT, 40)) + "\n"
    assert "drafted accepted (100%)" in result.stderr  # it is the same model


def test_bench_lines_a_draft_model_up(model_dir: Path, smaller_dir: Path, plan_file: Path, prompt_file: Path) -> None:
    options = ("--plan", plan_file, "--prompts", prompt_file, "--new-tokens", 9, "--repeats", 1, "--json")
    result = run("bench", model_dir, *options, "--draft-model", smaller_dir)
    assert result.exit_code == 0, result.output
    assert "gamma=4" in result.stdout
    contenders = {one["name"]: one for one in json.loads(result.stdout.splitlines()[-1])["contenders"]}
    classic = contenders["draft model"]
    assert classic["settings"] == {"draft_model": str(smaller_dir), "gamma": 4}
    assert classic["acceptance_rate"] == 1.0
    assert classic["differing_tokens"] == 0
    assert list(contenders)[-1] == "selfspec"


def test_misused_draft_models_are_refused_in_one_line(
    model_dir: Path, smaller_dir: Path, plan_file: Path, prompt_file: Path, tmp_path: Path
) -> None:
    generate = ("generate", model_dir, "--prompt", PROMPT)
    both = complaint(*generate, "--plan", plan_file, "--draft-model", smaller_dir)
    assert "drafts with the model's own layers" in both
    # Before models are loaded, and before it is told what the draft takes:
    assert both.endswith("without --plan, --draft-gamma sets the draft length")
    memory = ("--draft-memory", "1K")
    limited = complaint(*generate, *memory, "--draft-model", smaller_dir)
    assert limited.startswith("--draft-memory limits the draft weights of the model's own layers")
    assert both == complaint("generate", "no-model", "--prompt", PROMPT, "--plan", plan_file, "--draft-model", "none")
    assert "there is no model directory at" in complaint(*generate, "--draft-model", tmp_path / "none")
    gamma = ("--plan", plan_file, "--draft-gamma", 3)
    assert "--draft-gamma goes with --draft-model" in complaint(*generate, *gamma)
    assert "--draft-gamma goes with --draft-model" in complaint("bench", model_dir, "--prompts", prompt_file, *gamma)
    other = save_model(tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace('"!"', '"<other>"')
    (other / "tokenizer.json").write_text(text)
    assert "has another tokenizer than" in complaint(*generate, "--draft-model", other)


def test_a_retired_option_still_works_with_a_warning_and_is_not_in_the_help(model_dir: Path, tmp_path: Path) -> None:
    for option in (("--other-rows", 0), ("--other-rows=0",)):
        result = run("search", model_dir, "--prompts", "none.jsonl", "--out", tmp_path / "plan.json", *option)
        warning, error = result.stderr.splitlines()
        assert warning == "warning: --other-rows is now called --more-rows; use the new name"
        assert error == "error: --more-rows holds 0, but there is at least 1 row"
    assert "--other-rows" not in run("search", "--help").stdout
