"""The confirmation with made-up seconds: the baseline, the winner, and what a plan keeps of the confirmation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from models import ENDS_SKIPPED, FIRST_DROPPED, damped_model
from profiles import costs_of, profile_of
from replays import random_prompts, texts_of
from selfspec_search import SearchResult, SearchSettings
from selfspec_search.confirm.contender import Contender
from selfspec_search.confirm.plan_writer import Phases, PlanWriter, Trials
from selfspec_search.replay.rounds import Drafting
from selfspec_search.replay.texts import Text
from selfspec_search.report.data import ReportData
from selfspec_search.report.page import make_page
from selfspec_search.study.objective import Prediction
from transformers import PreTrainedModel

from selfspec import PassLengths, Plan
from selfspec.decoding.drafter import NoDrafter
from selfspec.plan.draft_spec import DraftSpec
from selfspec.plan.provenance import Figures
from selfspec.runtime.runtime import Runtime

NEW_TOKENS = 5
PADDED = PassLengths(rows=1, target=[3, 3, 3, 4], draft=2)
PLAIN, PADDED_PLAIN = "plain decoding", "plain decoding, padded"
FIGURES = Figures(tokens_per_round=2.0, acceptance_rate=0.9, tokens_per_second=9.0, speedup=1.2, texts=3)
RANKING = [
    Prediction(draft_spec=DraftSpec.of(skip_set), drafting=Drafting(2), figures=FIGURES)
    for skip_set in (ENDS_SKIPPED, FIRST_DROPPED)
]

Clock = Callable[[Contender, int], float]
"""Made-up seconds of a contender's run in a repeat."""


@cache
def model() -> PreTrainedModel:
    return damped_model("llama", ENDS_SKIPPED)


@cache
def texts() -> list[Text]:
    return texts_of(Runtime(model()), random_prompts(3, 13, 6, 5, seed=1), NEW_TOKENS)


def find(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, pass_lengths: PassLengths | None = PADDED, decoded: int = 4
) -> SearchResult:
    """The end of a search whose confirmation decodes `decoded` texts in the seconds of `clock`."""
    decode = Contender.decode

    def timed(self: Contender, batch: int, texts: Sequence[Text]) -> float:
        if not self.runs.get(batch):
            decode(self, batch, texts)
            first = self.runs[batch].pop()
        else:
            first = self.runs[batch][0]  # greedy repeats are equal
        self.runs[batch].append(replace(first, seconds=clock(self, len(self.runs[batch]))))
        return self.runs[batch][-1].seconds

    monkeypatch.setattr(Contender, "decode", timed)
    writer = PlanWriter(
        model=model(),
        settings=SearchSettings(gamma_max=3, new_tokens=NEW_TOKENS, repeats=3, lookup=False, confirm_texts=decoded),
        profile=profile_of(costs_of(attention=0.003, mlp=0.002), pass_lengths=pass_lengths),
        phases=Phases(on_progress=lambda progress: None),
    )
    trials = Trials(study="made up", ranking=RANKING, lookup=None, complete=2, pruned=0)
    return writer.run(trials, texts()[:2], texts())


def seconds(*, plain: float, padded: float, drafting: float) -> Clock:
    def clock(contender: Contender, repeat: int) -> float:
        if not isinstance(contender.drafter, NoDrafter):
            return drafting
        return plain if contender.runtime.pass_lengths is None else padded

    return clock


@pytest.mark.parametrize(
    ("plain", "padded", "drafting", "names", "speedup", "pass_lengths"),
    [
        (2.0, 3.0, 1.6, [PLAIN, PADDED_PLAIN], 1.25, PADDED),
        (3.0, 2.0, 1.6, [PADDED_PLAIN, PLAIN], 1.25, PADDED),
        (2.0, 3.0, 2.5, [PLAIN, PADDED_PLAIN], 0.8, None),
        (3.0, 2.0, 2.5, [PADDED_PLAIN, PLAIN], 0.8, PADDED),
    ],
    ids=["padding slows", "padding helps", "padding slows, and drafts lose", "padding helps, and drafts lose"],
)
def test_speedups_are_over_the_faster_plain_decoding(
    monkeypatch: pytest.MonkeyPatch,
    plain: float,
    padded: float,
    drafting: float,
    names: list[str],
    speedup: float,
    pass_lengths: PassLengths | None,
) -> None:
    result = find(monkeypatch, seconds(plain=plain, padded=padded, drafting=drafting))
    assert list(result.plains) == names
    assert [figures.speedup for figures in result.plains.values()] == pytest.approx([1.0, 2 / 3])
    assert [one.measured.speedup for one in result.confirmed] == pytest.approx([speedup] * 2)
    assert result.plan.speculates == (speedup > 1)
    assert result.plan.pass_lengths == pass_lengths
    provenance = result.plan.provenance
    assert provenance.measured.speedup == pytest.approx(max(1.0, speedup))
    assert provenance.measured.tokens_per_second == pytest.approx(NEW_TOKENS / min(plain, padded, drafting))


def test_plain_decoding_runs_once_if_the_padding_changes_none_of_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    others_only = PassLengths(rows=1, target=[1, 3, 3, 4], draft=2)
    result = find(monkeypatch, seconds(plain=2.0, padded=0.0, drafting=1.6), others_only)
    assert list(result.plains) == [PLAIN]
    assert result.plan.pass_lengths == others_only


TWICE = "measured 2.00x, but"
EQUAL = f"{TWICE} the chosen plan is as fast to two digits and drafts with less."
UNSURE = f"{TWICE} its 95 % interval (0.50-2.00) includes plain decoding."


def rivals(first: Sequence[float], second: Sequence[float]) -> Clock:
    """Seconds in each repeat of the plan that was tried first, and of the other; plain decoding takes 2 seconds."""

    def clock(contender: Contender, repeat: int) -> float:
        if isinstance(contender.drafter, NoDrafter):
            return 2.0
        return (first if contender.runtime.draft_spec.skip_set == ENDS_SKIPPED else second)[repeat]

    return clock


@pytest.mark.parametrize(
    ("first", "second", "decoded", "chosen", "reason"),
    [
        ([1.0] * 3, [1.5] * 3, 4, ENDS_SKIPPED, ""),
        (
            [1.001] * 3,
            [1.0] * 3,
            4,
            ENDS_SKIPPED,
            EQUAL,
        ),
        ([1.0, 1.0, 5.0], [1.5] * 3, 4, FIRST_DROPPED, UNSURE),
        ([1.0, 1.0, 5.0], [2.5] * 3, 4, None, UNSURE),
        ([1.0, 1.0, 2.1], [2.5] * 3, 3, None, f"{TWICE} it was not faster than plain decoding in every repeat."),
        ([2.5] * 3, [3.0] * 3, 4, None, ""),
    ],
    ids=["the fastest", "the smaller draft", "the sure one", "none is sure", "too few texts", "none is faster"],
)
def test_plan_and_report_keep_what_every_rival_measured_and_why_the_winner_won(
    monkeypatch: pytest.MonkeyPatch, first: list[float], second: list[float], decoded: int, chosen: object, reason: str
) -> None:
    result = find(monkeypatch, rivals(first, second), None, decoded)
    assert (result.winner and result.winner.prediction.skip_set) == chosen
    plan = Plan.from_json(result.plan.to_json())
    assert plan.provenance.confirmation == result.rows()
    assert len(result.rows()) == 3
    assert plan.provenance.why == result.why
    assert result.why.partition("' ")[2] == reason
    html = make_page(ReportData(source="plan.json", plan=plan)).html
    assert all(row["tokens/s"] in html and row["95 %"] in html for row in result.rows())
    assert reason in html
