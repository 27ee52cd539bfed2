"""Where tokens come from, in colour, and how often drafts were right, as bars."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from commands import run
from rich.console import Console
from rich.style import Style
from rich.text import Text
from saved import PLAN, byte_tokenizer
from transformers import AutoModelForCausalLM

from selfspec import Plan, SelfSpeculator, Stats
from selfspec.cli.formatting import bar_of
from selfspec.cli.terminal import ORIGINS, asides
from selfspec.cli.token_view import MOST_BARS, Detokenizer, Show, origin_of, printable, tell
from selfspec.decoding.acceptance import Committed
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.round_costs import RoundCosts

BOTH = PLAN.model_copy(update={"prompt_lookup": PromptLookup(gamma=5, min_ngram=1)})
PROMPT = "zzz"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return BOTH.save(tmp_path / "plan.json")


@pytest.fixture
def three_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\nthree\n")
    return path


def show(rounds: list[Committed], plan: Plan = BOTH) -> tuple[Show, Stats]:
    """What is told of these rounds of one row."""
    shown, stats = Show(plan), Stats(rows=1)
    for committed in rounds:
        stats.count_pass([committed])
        for index in range(len(committed.tokens)):
            shown.style(committed, index)
    return shown, stats


def console(width: int = 80, encoding: str = "utf8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=width)


def told(rounds: list[Committed], **options: Any) -> list[str]:
    shown, stats = show(rounds)
    return [line.plain.rstrip() for line in shown.summary(stats, console(**options))]


@pytest.mark.parametrize(
    ("committed", "origins"),
    [
        (Committed(0, 5, [1, 2, 3], 3, 2, "lookup"), ["lookup", "lookup", "recovered"]),
        (Committed(0, 5, [1, 2, 3], 2, 2, "layers"), ["layers", "layers", "bonus"]),
        (Committed(0, 5, [1, 2], 1, 1, "draft model"), ["draft model", "bonus"]),
        (Committed(0, 5, [7], 3, 0, "layers"), ["recovered"]),
        (Committed(0, 5, [7], 0, 0, "layers"), ["undrafted"]),
        (Committed(0, 5, [7], 0, 0), ["undrafted"]),
        (Committed(0, 5, [1, 2], 3, 2, "lookup"), ["lookup", "lookup"]),  # the row ended within its draft
    ],
)
def test_the_token_behind_a_draft_is_recovered_where_it_failed_and_a_bonus_where_it_passed(
    committed: Committed, origins: list[str]
) -> None:
    assert [origin_of(committed, index) for index in range(len(committed.tokens))] == origins


def test_every_origin_has_a_style_of_its_own() -> None:
    assert len(set(ORIGINS.values())) == len(ORIGINS)


def coloured(text: Text) -> list[tuple[str, int | None]]:
    """Each visible character with its colour's number."""
    colours: list[int | None] = [None] * len(text)
    for span in text.spans:
        colour = (Style.parse(span.style) if isinstance(span.style, str) else span.style).color
        colours[span.start : span.end] = [colour.number if colour else None] * (span.end - span.start)
    return [(char, colour) for char, colour in zip(text.plain, colours, strict=True) if not char.isspace()]


def number(origin: str) -> int | None:
    colour = Style.parse(ORIGINS[origin]).color
    return colour.number if colour else None


def test_every_character_has_the_colour_of_the_token_that_completed_it(
    model_dir: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), byte_tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    detokenizer, expected, seen = Detokenizer(tokenizer, prompt[0].tolist()), Text(), set()
    for row in SelfSpeculator(model, BOTH).stream_rounds(prompt, max_new_tokens=70, do_sample=False):
        assert row.origin is not None
        behind = "undrafted" if not row.drafted else "recovered" if row.accepted < row.drafted else "bonus"
        for token, origin in zip(row.tokens, [row.origin] * row.accepted + [behind], strict=False):
            expected.append(printable(detokenizer.put(token)), style=ORIGINS[origin])
            seen.add(origin)
    assert seen == {"lookup", "layers", "recovered", "bonus", "undrafted"}
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    result = run("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 70, "--show")
    shown = Text("\n").join(Text.from_ansi(line) for line in result.stdout.split("\n"))
    assert coloured(shown)[: len(coloured(expected))] == coloured(expected)
    legend = Text.from_ansi(next(line for line in result.stderr.splitlines() if "by layers" in line))
    assert legend.plain == "by lookup  by layers  recovered (draft wrong)  bonus (draft right)  undrafted"
    assert {colour for _, colour in coloured(legend)} == {number(origin) for origin in seen}


def test_a_pipe_gets_the_plain_text_and_neither_colours_nor_a_legend(model_dir: Path, plan_file: Path) -> None:
    command = ("generate", model_dir, "--plan", plan_file, "--prompt", PROMPT, "--max-new-tokens", 40)
    plain, shown = run(*command), run(*command, "--show")
    assert shown.stdout == plain.stdout
    assert "\x1b" not in shown.stdout + shown.stderr
    assert "undrafted" not in shown.stderr.splitlines()[0]
    assert plain.stderr.count("\n") == 1
    assert shown.stderr.splitlines()[1].startswith("acceptance by position")
    assert shown.stderr.splitlines()[-1].startswith("40 tokens: ")


# --- The chart ---

ROUNDS = [
    Committed(0, 5, [1, 2, 9], 3, 2, "layers"),
    Committed(0, 8, [1, 9], 1, 1, "lookup"),
    Committed(0, 10, [9], 3, 0, "layers"),
    Committed(0, 11, [1, 2, 3, 9], 3, 3, "lookup"),
    Committed(0, 15, [9], 0, 0, "layers"),
]


def test_the_chart_tells_what_was_counted_by_hand() -> None:
    assert told(ROUNDS) == [
        "acceptance by position in the draft, after an accepted prefix",
        " 1 ██████████████████████████████            75%  3 of 4",
        " 2 ████████████████████████████████████████ 100%  2 of 2",
        " 3 ████████████████████                      50%  1 of 2",
        "11 tokens: 4 of 4 by lookup (100%), 2 of 6 by layers (33%), 2 recovered, 2 bonus, 1 undrafted",
    ]


def test_a_bar_shows_by_colour_who_drafted_what_was_accepted() -> None:
    shown, stats = show(ROUNDS)
    bars = [coloured(line) for line in shown.summary(stats, console())[1:4]]
    colours = [[colour for char, colour in bar if char == "█"] for bar in bars]
    lookup, layers = [number("lookup")], [number("layers")]
    assert colours == [lookup * 20 + layers * 10, lookup * 20 + layers * 20, lookup * 20]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_bars_are_plain_where_the_encoding_lacks_blocks(encoding: str) -> None:
    lines = told(ROUNDS, encoding=encoding)
    assert lines[1] == " 1 ##############################            75%  3 of 4"
    assert "\n".join(lines).isascii()


def test_what_is_told_on_stderr_fits_the_encoding_of_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stderr", stderr)
    shown, stats = show(ROUNDS)
    tell(shown.summary(stats, asides()))
    stderr.flush()
    assert b"\n 1 ####" in stderr.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [23, 37, 79])
def test_bars_stay_within_the_terminal(width: int) -> None:
    bars = told(ROUNDS, width=width)[1:4]
    assert max(map(len, bars)) < width
    assert all(bar.endswith(end) for bar, end in zip(bars, ("3 of 4", "2 of 2", "1 of 2"), strict=True))
    assert bars[1].count("█") == min(40, width - 17)


def test_a_terminal_too_narrow_for_anything_still_gets_bars() -> None:
    assert told(ROUNDS, width=5)[2] == " 2 █ 100%  2 of 2"


def test_bars_are_true_to_an_eighth_of_a_column() -> None:
    assert [bar_of(share / 16, 2, blocks=True) for share in (0, 1, 8, 11, 16)] == ["", "▏", "█", "█▍", "██"]
    assert bar_of(0.5, 7, blocks=False) == "####"


def test_positions_that_no_draft_reached_have_no_share() -> None:
    lines = told([Committed(0, 5, [9], 2, 0, "layers")])
    assert [line.split() for line in lines[1:3]] == [["1", "0%", "0", "of", "1"], ["2", "-", "0", "of", "0"]]


def test_far_positions_share_the_last_bar() -> None:
    n = MOST_BARS + 3
    lines = told([Committed(0, 5, [1] * n + [9], n, n, "lookup"), Committed(0, 50, [1] * 13 + [9], n, 13, "layers")])
    assert len(lines) == 1 + MOST_BARS + 1
    assert lines[MOST_BARS - 1].endswith("100%  2 of 2")
    # Positions 12 and 13 twice; 14 twice, accepted once; 15 once.
    assert lines[MOST_BARS].split() == ["12+", lines[MOST_BARS].split()[1], "86%", "6", "of", "7"]


# --- From the command line ---


def test_all_prompts_have_one_chart_also_when_sampling(model_dir: Path, plan_file: Path, three_prompts: Path) -> None:
    options = ("--prompt-file", three_prompts, "--max-new-tokens", 17, "--temperature", 0.8, "--show")
    result = run("generate", model_dir, "--plan", plan_file, *options)
    assert result.exit_code == 0, result.output
    figures = [line for line in result.stderr.splitlines() if " tokens in " in line]
    tokens = [int(line.split()[0]) for line in figures]
    assert len(tokens) == 3
    assert result.stderr.count("acceptance by position") == 1
    assert result.stderr.splitlines()[-1].startswith(f"{sum(tokens)} tokens: ")


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (Plan.none(), "nothing was drafted: this plan does not speculate"),
        (
            Plan(skip_set=PLAN.skip_set, gamma=0, prompt_lookup=PromptLookup(gamma=3, min_ngram=8)),
            "nothing was drafted",
        ),
    ],
)
def test_where_nothing_is_drafted_one_line_says_so(model_dir: Path, plan_file: Path, plan: Plan, line: str) -> None:
    plan.save(plan_file)
    options = ("--prompt", "x", "--max-new-tokens", 7, "--show")
    result = run("generate", model_dir, "--plan", plan_file, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[1:] == [line]


def test_a_plan_that_never_drafts_has_no_legend() -> None:
    assert not Show(Plan.none()).legend()
    assert "by lookup" not in Show(PLAN).legend().plain


def drafters_named(plan: Plan, drafts: Literal["layers", "draft model"] = "layers") -> list[str]:
    return [words for words in Show(plan, drafts).legend().plain.split("  ") if words.startswith("by ")]


def test_the_legend_names_those_who_may_draft_and_nobody_else() -> None:
    round_costs = RoundCosts(rows=1, draft_step=0.1, rounds=[1.0] * 9, agreement=[0.6], matches=[[0.4, 0.8]] * 5)
    assert drafters_named(BOTH) == ["by lookup", "by layers"]
    assert drafters_named(BOTH, "draft model") == ["by lookup", "by draft model"]
    # The policy looks up unasked, but not without costs of lookup, and not where a draft model drafts.
    both = (round_costs, round_costs.model_copy(update={"matches": []}))
    costly, without = (PLAN.model_copy(update={"round_costs": [costs]}) for costs in both)
    assert drafters_named(costly) == ["by lookup", "by layers"]
    assert drafters_named(costly, "draft model") == ["by draft model"]
    assert drafters_named(without) == ["by layers"]


def test_a_draft_models_tokens_have_the_colour_that_the_legend_gives_it(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    options = ("--draft-model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 30, "--show")
    result = run("generate", model_dir, *options)
    assert result.exit_code == 0, result.output
    named = Text.from_ansi(next(line for line in result.stderr.splitlines() if "bonus (draft right)" in line))
    assert named.plain == "by draft model  recovered (draft wrong)  bonus (draft right)  undrafted"
    seen = {colour for line in result.stdout.split("\n") for _, colour in coloured(Text.from_ansi(line))}
    assert number("draft model") in seen
    assert seen <= {colour for _, colour in coloured(named)}


def test_ctrl_c_ends_with_a_chart_of_what_was_written(
    model_dir: Path, plan_file: Path, three_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = iter(range(19))
    put = Detokenizer.put

    def interrupted(self: Detokenizer, token: int) -> str:
        if next(pieces, None) is None:
            raise KeyboardInterrupt
        return put(self, token)

    monkeypatch.setattr(Detokenizer, "put", interrupted)
    options = ("--prompt-file", three_prompts, "--max-new-tokens", 13, "--show", "--stats", tmp_path / "figures.json")
    result = run("generate", model_dir, "--plan", plan_file, *options)
    assert result.exit_code == 130
    assert result.stderr.count(" tokens in ") == 2
    assert result.stderr.splitlines()[-1].startswith("20 tokens: ")
    assert '"rows": 2' in (tmp_path / "figures.json").read_text()


def test_ctrl_c_before_a_prompt_begins_does_not_count_the_one_before_twice(
    model_dir: Path, plan_file: Path, three_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = SelfSpeculator.stream_rounds
    started: list[object] = []

    def interrupted(self: SelfSpeculator, *args: Any, **kwargs: Any) -> Iterator[Committed]:
        started.append(args)
        if len(started) == 2:
            raise KeyboardInterrupt
        yield from stream(self, *args, **kwargs)

    monkeypatch.setattr(SelfSpeculator, "stream_rounds", interrupted)
    options = ("--prompt-file", three_prompts, "--max-new-tokens", 13, "--show")
    result = run("generate", model_dir, "--plan", plan_file, *options)
    assert result.exit_code == 130
    assert result.stderr.count(" tokens in ") == 1
    assert result.stderr.splitlines()[-1].startswith("13 tokens: ")
