"""The policy: the drafter and draft length it chooses, and when it decodes plainly. The text stays the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import pytest
import torch
from models import FIRST_DROPPED, damped_model, prompts
from tape import TapeRecorder
from transformers import PreTrainedModel

from selfspec import InputError, Plan, PlanError, PlanWarning, SelfSpeculator, SkipSet, wrap
from selfspec.plan.lookup import PromptLookup
from selfspec.plan.provenance import Conditions, Provenance
from selfspec.plan.round_costs import MATCHES, RoundCosts, match_class
from selfspec.policy.adaptive_drafter import AdaptiveDrafter
from selfspec.policy.estimates import AgreementEstimate
from selfspec.policy.policy import FIRST_WAIT, LONGEST_WAIT, AdaptivePolicy, Choice, Row, RowOutcome
from selfspec.policy.select import drafter_for, unsupported_reason
from selfspec.runtime.runtime import Runtime

LONGEST = 7
ROUNDS = [1.0 + 0.11 * n for n in range(LONGEST + 1)]
LOOKUPS = (1, 2, 3, 4, 6, LONGEST)
SHARES = [[0.3, 0.6], [0.4, 0.7], [0.5, 0.75], [0.6, 0.8], [0.8, 0.9]]
"""Agreement of prompt lookup, by length class of the match."""


def round_costs(*agreement: float, draft_step: float = 0.3, rows: int = 1, **more: object) -> RoundCosts:
    return RoundCosts(rows=rows, draft_step=draft_step, rounds=ROUNDS, agreement=list(agreement), **more)


def policy_with_lookup(agreement: float, **more: object) -> AdaptivePolicy:
    return AdaptivePolicy(
        round_costs(agreement, **{"matches": SHARES, "lookup": 0.01} | more), range(LONGEST + 1), LOOKUPS
    )


class Layers:
    """A policy of drafts by layers alone, for one row."""

    def __init__(self, *agreement: float, draft_step: float = 0.3) -> None:
        self.policy = AdaptivePolicy(round_costs(*agreement, draft_step=draft_step), range(LONGEST + 1))

    def round(self, accepted: int = LONGEST) -> int:
        """Decode a round, in which up to `accepted` tokens are accepted; returns the draft length."""
        drafted = self.policy.choose([Row()]).layers
        self.policy.observe([RowOutcome(drafted, min(accepted, drafted), 1 + min(accepted, drafted))])
        return drafted


# --- The estimate ---


def test_the_first_estimate_is_the_plans_and_deeper_depths_equal_the_plans_last() -> None:
    estimate = AgreementEstimate([0.9, 0.7], longest=5)
    assert [estimate[depth] for depth in range(4)] == pytest.approx([0.9, 0.7, 0.7, 0.7])
    assert estimate.tokens[3] == pytest.approx(1 + 0.9 + 0.9 * 0.7 + 0.9 * 0.7 * 0.7)


@pytest.mark.parametrize("true", [0.2, 0.6, 0.97])
def test_the_estimate_follows_the_text_within_fifty_rounds(true: float) -> None:
    estimate, draws = AgreementEstimate([0.8, 0.8, 0.8], longest=3), random.Random(3)
    for _ in range(50):
        accepted = run(3, true, true, draws)
        estimate.observe([(min(3, accepted + 1), accepted)])
    assert estimate[0] == pytest.approx(true, abs=0.15)


def test_depths_that_are_not_drafted_follow_the_drafted_depths() -> None:
    estimate = AgreementEstimate([0.8, 0.7, 0.6], longest=3)
    for _ in range(50):
        estimate.observe([(1, 0)])
    assert estimate[2] < 0.2


def test_the_first_looked_up_token_has_an_estimate_of_its_own() -> None:
    estimate = AgreementEstimate([0.5, 0.8], longest=LONGEST)
    for _ in range(200):
        estimate.observe([(4, 3)])
    assert estimate[0] == pytest.approx(1, abs=0.02)
    assert [estimate[depth] for depth in (1, LONGEST - 1)] == pytest.approx([2 / 3] * 2, abs=0.08)


def test_matches_fall_into_five_length_classes() -> None:
    assert [match_class(n) for n in (1, 2, 3, 4, 5, 7, 8, 50)] == [0, 1, 2, 2, 3, 3, 4, 4]


# --- The choice ---


@pytest.mark.parametrize("agreement", [0.05, 0.35, 0.6, 0.8, 0.93, 0.99])
def test_the_draft_length_with_the_most_expected_tokens_per_second_is_chosen(agreement: float) -> None:
    speeds = [sum(accumulate([1.0] + [agreement] * n, mul)) / (0.3 * n + ROUNDS[n]) for n in range(LONGEST + 1)]
    assert speeds[Layers(agreement).round()] == pytest.approx(max(speeds))


def test_hysteresis_keeps_the_last_choice_unless_another_gains_distinctly_more() -> None:
    def lengths(last: int) -> list[int]:
        """The draft lengths chosen after `last`, at rising agreement."""
        chosen = []
        for agreement in (0.6, 0.65, 0.7, 0.75, 0.8):
            one = Layers(agreement).policy
            one._chosen = {-1: Choice(last)}
            chosen.append(one.choose([Row()]).layers)
        return chosen

    assert lengths(1) != lengths(2) != lengths(3), "between two lengths of nearly equal gain, the last one stays"
    assert lengths(0) == lengths(7), "a length of distinctly less gain never stays"


@pytest.mark.parametrize("draft_step", [0.1, 0.3, 0.6])
def test_the_wait_for_the_next_probe_doubles_while_drafts_never_pay(draft_step: float) -> None:
    plain = Layers(0.01, draft_step=draft_step)
    probes = [number for number in range(1500) if plain.round(accepted=0)]
    assert probes[0] == FIRST_WAIT
    waits = [later - earlier - 1 for earlier, later in pairwise(probes)]
    assert waits[:3] == [2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
    assert max(waits) == LONGEST_WAIT


def test_drafting_resumes_when_the_text_becomes_easy() -> None:
    one = Layers(0.9)
    for _ in range(200):
        one.round(accepted=0)
    assert next(n for n in range(500) if one.round() >= 3) < 1.5 * LONGEST_WAIT


def test_drafting_stops_within_a_few_rounds_when_the_text_becomes_hard() -> None:
    one, draws = Layers(0.9), random.Random(11)
    for _ in range(300):
        one.round(run(LONGEST, 0.95, 0.95, draws))
    assert next(n for n in range(50) if not one.round(accepted=0)) < 15
    assert "no match: none (" in one.policy.changes[-1]
    assert "instead of layers 1" in one.policy.changes[-1]
    while not one.round():
        pass
    assert "no match: layers 1 (" in one.policy.changes[-1]
    assert "as a probe" in one.policy.changes[-1]


@pytest.mark.parametrize("agreement", [[0.8], [0.8, 0.8, 0.8]])
def test_tokens_drafted_after_a_stop_token_do_not_change_the_estimate(agreement: list[float]) -> None:
    one, same = (AdaptivePolicy(round_costs(*agreement), [3]) for _ in range(2))
    for policy, drafted in ((one, 3), (same, 1)):
        policy.choose([Row()])
        policy.observe([RowOutcome(drafted, accepted=1, committed=1)])  # the first accepted token ended the row
    assert one.agreement.tokens == same.agreement.tokens


def test_lookup_drafts_only_after_matches_of_a_class_that_was_right() -> None:
    one, long, short = policy_with_lookup(0.3), Row(LONGEST, 8), Row(LONGEST, 1)
    for _ in range(60):
        for row, right in ((long, LONGEST), (short, 0)):
            one.choose([row])
            one.observe([RowOutcome(0, 0, right + 1, *row, right)])
    assert one.choose([long]).lookup >= 4
    assert not one.choose([short]).lookup


def test_lookup_is_estimated_while_layers_draft() -> None:
    one, row, rounds = policy_with_lookup(0.9, matches=[[0.01, 0.01]] * 5), Row(LONGEST, 8), 0
    assert not one.choose([row]).lookup
    while not (choice := one.choose([row])).lookup and rounds < 50:
        accepted = min(choice.layers, 2)
        one.observe([RowOutcome(choice.layers, accepted, accepted + 1, *row, accepted + 1)])
        rounds += 1
    assert rounds < 20
    assert any("match of 8 or more: lookup" in change for change in one.changes)


def test_rows_without_a_match_draft_by_layers_while_other_rows_draft_by_lookup() -> None:
    one = policy_with_lookup(0.7, rows=3, draft_step=0.05, matches=[[0.99, 0.99]] * 5)
    chosen = one.choose([Row(LONGEST, 8), Row(LONGEST, 8), Row()])
    assert chosen.lookup
    assert chosen.layers


def test_layers_are_not_probed_where_they_cannot_beat_lookup() -> None:
    one, row = policy_with_lookup(0.9, draft_step=0.5), Row(LONGEST, 8)
    for number in range(560):
        assert one.choose([row]).lookup == LONGEST or number < 60
        one.observe([RowOutcome(0, 0, LONGEST + 1, *row, LONGEST)])


@pytest.mark.parametrize(("matched", "looks"), [(3, False), (4, True)])
def test_a_shortest_match_between_two_classes_is_respected(matched: int, looks: bool) -> None:
    one = AdaptivePolicy(round_costs(0.1, matches=[[0.99, 0.99]] * 5), [0, 3], LOOKUPS, leasts=[4])
    assert bool(one.choose([Row(LONGEST, matched)]).lookup) == looks


# --- Priced, on simulated text ---

KINDS = {
    # agreement; share of rounds with a match; weights of its length classes; agreement of its first and later tokens
    "prose": (0.3, 0.3, (4, 3, 2, 1, 1), (0.1, 0.15, 0.2, 0.3, 0.4), 0.5),
    "code": (0.8, 0.5, (4, 3, 2, 1, 1), (0.2, 0.3, 0.4, 0.5, 0.6), 0.7),
    "copy": (0.8, 0.97, (1, 1, 2, 2, 4), (0.5, 0.7, 0.8, 0.95, 0.98), 0.97),
    "hard": (0.02, 1.0, (1, 0, 0, 0, 0), (0.02,) * 5, 0.5),
    "easy": (0.97, 1.0, (1, 0, 0, 0, 0), (0.02,) * 5, 0.5),
}
MIXED = [("prose", 150), ("code", 150), ("copy", 150)] * 10
FIXED = [
    *(Choice(n) for n in (0, 1, 2, 3, 4, 6)),
    *(Choice(0, n, least) for n in (3, LONGEST) for least in (1, 2, 3)),
    *(Choice(layers, n, least) for n in (3, LONGEST) for least in (1, 3) for layers in (2, 4)),
]


def run(most: int, first: float, later: float, draws: random.Random) -> int:
    """Draw how many of `most` drafted tokens are accepted, at an agreement of the first and of later tokens."""
    accepted = 0
    while accepted < most and draws.random() < (later if accepted else first):
        accepted += 1
    return accepted


def looks_up(choice: Choice, row: Row) -> bool:
    return bool(choice.lookup and row.found and row.matched >= choice.least)


def priced(texts: Sequence[tuple[str, int]], chooser: AdaptivePolicy | Choice, costs: RoundCosts) -> float:
    """Tokens per priced second over `texts`: kinds of text, and tokens of a row."""
    draws, tokens, seconds, rows = random.Random(5), 0, 0.0, costs.rows
    for kind, length in texts:
        agreement, hit, lengths, firsts, later = KINDS[kind]
        until = tokens + length * rows
        while tokens < until:
            classes = [draws.choices(range(5), lengths)[0] if draws.random() < hit else -1 for _ in range(rows)]
            right = [run(LONGEST, firsts[at], later, draws) if at >= 0 else 0 for at in classes]
            now = [Row(LONGEST, MATCHES[at]) if at >= 0 else Row() for at in classes]
            choice = chooser if isinstance(chooser, Choice) else chooser.choose(now)
            seen, steps, longest = [], 0, 0
            for row, runs in zip(now, right, strict=True):
                if looks_up(choice, row):
                    accepted, longest = min(runs, choice.lookup), max(longest, choice.lookup)
                    by_layers = (0, 0)
                else:
                    accepted, steps = run(choice.layers, agreement, agreement, draws), choice.layers
                    by_layers = (choice.layers, accepted)
                seen.append(RowOutcome(*by_layers, accepted + 1, *row, min(runs, accepted + 1)))
            tokens += sum(row.committed for row in seen)
            seconds += costs.rounds[max(steps, longest)] + steps * costs.draft_step + costs.lookup
            if isinstance(chooser, AdaptivePolicy):
                chooser.observe(seen)
    return tokens / seconds


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("draft_step", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["prose", "code", "copy", "mixed"])
def test_the_policy_is_near_the_best_fixed_choice_and_nearer_on_mixed_text(
    kind: str, draft_step: float, rows: int
) -> None:
    texts = MIXED if kind == "mixed" else [(kind, 4000)]
    one = policy_with_lookup(0.7, draft_step=draft_step, rows=rows)
    fixed = {choice: priced(texts, choice, one.round_costs) for choice in FIXED}
    adaptive = priced(texts, one, one.round_costs)
    assert adaptive > (0.99 if kind == "mixed" else 0.96) * max(fixed.values()), fixed
    assert adaptive > 0.98 * fixed[Choice()]


@pytest.mark.parametrize("draft_step", [0.1, 0.7])
@pytest.mark.parametrize(
    ("hit", "lengths"), [(1.0, (0, 0, 0, 0, 1)), (1.0, (1, 0, 0, 0, 0)), (0.3, (1, 1, 1, 1, 1)), (0.0, (1, 1, 1, 1, 1))]
)
def test_where_every_draft_is_wrong_the_policy_keeps_98_percent_of_plain_decoding(
    hit: float, lengths: tuple[int, ...], draft_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "hopeless", (0.0, hit, lengths, (0.0,) * 5, 0.0))
    one = policy_with_lookup(0.95, draft_step=draft_step)
    plain = priced([("hopeless", 3000)], Choice(), one.round_costs)
    assert priced([("hopeless", 3000)], one, one.round_costs) > 0.98 * plain


def test_the_choice_changes_in_fewer_than_a_fifth_of_630_rounds() -> None:
    one = policy_with_lookup(0.7)
    priced([("code", 1500)], one, one.round_costs)
    assert len(one.changes) < 126


def test_layers_draft_again_where_every_match_is_wrong() -> None:
    one = policy_with_lookup(0.7)
    priced([("hard", 600)], one, one.round_costs)
    assert not one.choose([Row(LONGEST, 1)]).layers
    one.observe([RowOutcome(0, 0, 1, LONGEST, 1, 0)])
    assert priced([("easy", 2000)], one, one.round_costs) > 1.4, "tokens in the time of a plain pass"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("agreement", [[0.0], [0.0, 0.0, 0.0], [1.0], [1.0] * 11])
@pytest.mark.parametrize("matches", [[], [[0.0, 0.0]] * 5, [[1.0, 1.0]] * 5])
def test_estimates_stay_finite_in_any_batch_to_its_last_token(
    static: bool, agreement: list[float], matches: list[list[float]]
) -> None:
    draws, costs = random.Random(7), round_costs(*agreement, draft_step=0.0, rows=5, matches=matches)
    one = AdaptivePolicy(costs, range(LONGEST + 1), LOOKUPS if matches else (), static=static)
    for left in [LONGEST] * 200 + list(range(LONGEST, -1, -1)) * 13:
        rows = [Row(draws.randrange(left + 1) * bool(matches), draws.randrange(1, 11)) for _ in range(5 - left % 3)]
        choice, seen = one.choose(rows), []
        for row in rows:
            by_lookup = looks_up(choice, row)
            drafted = min(choice.lookup, row.found) if by_lookup else min(choice.layers, left)
            accepted = draws.randrange(drafted + 1)
            by_layers = (0, 0) if by_lookup else (drafted, accepted)
            seen.append(RowOutcome(*by_layers, accepted + 1, *row, min(row.found, accepted)))
        one.observe(seen)
        assert 0 < one.speed < float("inf")
        assert all(0 <= each[depth] <= 1 for each in (one.agreement, *one.matches) for depth in range(13))


# --- Which requests adapt ---


def plan(**changes: object) -> Plan:
    return Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[round_costs(0.6)]).model_copy(update=changes)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


def conditions(**changes: object) -> Provenance:
    found = Conditions(device="cpu", dtype="float32").model_copy(update=changes)
    return Provenance(conditions=found, seed=0, trials=1)


def assert_lossless(spec: SelfSpeculator, *lengths: int, new_tokens: int) -> None:
    """Greedy text after prompts of these lengths is the model's."""
    tokens, mask = prompts(*lengths)
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new_tokens}
    assert torch.equal(spec.generate(tokens, **options), spec.model.generate(tokens, **options))


WITH_LOOKUP = [round_costs(0.6, matches=SHARES)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"provenance": conditions()}, None),
        ({"round_costs": []}, "has no round costs"),
        ({"gamma": 0, "skip_set": SkipSet(), "round_costs": WITH_LOOKUP}, None),
        ({"gamma": 0, "skip_set": SkipSet(), "round_costs": []}, "never drafts"),
        ({"exit_threshold": 0.4}, "exit threshold sets the draft length"),
        ({"prompt_lookup": PromptLookup(gamma=2)}, "no agreement of prompt lookup"),
        ({"prompt_lookup": PromptLookup(gamma=2), "round_costs": WITH_LOOKUP}, None),
        ({"round_costs": [round_costs(0.6, rows=4)]}, "knows what 4 rows cost, not 1"),
        ({"round_costs": [round_costs(0.6, rows=4), round_costs(0.6)]}, None),
        ({"provenance": conditions(dtype="bfloat16")}, "dtype bfloat16, here float32"),
        ({"provenance": conditions(device="NVIDIA H200")}, "device NVIDIA H200, here cpu"),
    ],
)
def test_the_policy_adapts_only_where_the_plans_costs_hold(
    changes: dict[str, object], reason: str | None, llama: PreTrainedModel
) -> None:
    runtime = Runtime(llama, FIRST_DROPPED)
    unsupported = unsupported_reason(plan(**changes), runtime, rows=1)
    assert (unsupported is None) == (reason is None)
    assert reason is None or reason in str(unsupported)
    drafter, words = drafter_for(plan(**changes), runtime, 1, "adaptive")
    assert isinstance(drafter, AdaptiveDrafter) == (reason is None)
    assert words == ("adaptive" if reason is None else f"fixed: {unsupported}")
    drafter, words = drafter_for(plan(**changes), runtime, 1, "fixed")
    assert not isinstance(drafter, AdaptiveDrafter)
    assert words == "fixed"


def test_few_draft_lengths_compete_where_each_must_be_captured(llama: PreTrainedModel) -> None:
    both = plan(prompt_lookup=PromptLookup(gamma=5, min_ngram=3), round_costs=WITH_LOOKUP)

    def competing(one: Plan, runtime: Runtime) -> tuple[list[int], list[int], list[int]]:
        drafter, _ = drafter_for(one, runtime, 1, "adaptive")
        assert isinstance(drafter, AdaptiveDrafter)
        return list(drafter.policy.layers), list(drafter.policy.lookups), list(drafter.policy.leasts)

    eager, captured = Runtime(llama, FIRST_DROPPED), Runtime(llama, graphs=TapeRecorder())
    assert competing(both, eager) == (list(range(LONGEST + 1)), list(range(1, LONGEST + 1)), list(MATCHES))
    assert competing(both, captured) == ([0, 2, 3, 6], [5], [3])
    assert competing(plan(gamma=5, round_costs=WITH_LOOKUP), captured) == ([0, 3, 5, 7], [7], [2])
    assert competing(plan(gamma=7), captured) == ([0, 4, 7], [], [2])


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_text_is_the_models_under_every_choice(captured: bool, llama: PreTrainedModel) -> None:
    one = plan(round_costs=[round_costs(0.9, 0.8, draft_step=0.15, matches=SHARES)])
    spec = SelfSpeculator(llama, one, recorder=TapeRecorder() if captured else None)
    assert_lossless(spec, 11, new_tokens=173)
    choices = dict(spec.stats.choices)
    assert len(choices) > 1, f"only {choices} were tried"
    assert sum(choices.values()) == spec.stats.passes
    assert spec.stats.policy == "adaptive"
    assert_lossless(spec, 11, new_tokens=173)
    assert spec.stats.choices == choices, "equal requests are decoded equally"


def test_all_rows_of_a_batch_adapt_together(llama: PreTrainedModel) -> None:
    spec = wrap(llama, plan(round_costs=[round_costs(0.9, rows=3)]))
    assert_lossless(spec, 11, 5, 7, new_tokens=61)
    assert len(spec.stats.choices) > 1


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, "1 row"),
        ({"round_costs": [round_costs(0.6), round_costs(0.6, rows=2)]}, "1 and 2 rows"),
        ({"round_costs": [], "exit_threshold": 0.01, "provenance": conditions(rows=2)}, "2 rows"),
    ],
)
def test_more_rows_than_the_plan_has_costs_for_are_decoded_plainly_with_one_warning(
    changes: dict[str, object], known: str, llama: PreTrainedModel
) -> None:
    spec, reason = wrap(llama, plan(**changes)), f"the plan knows what {known} cost, not 3"
    with pytest.warns(PlanWarning, match=f"{reason}, so they are decoded plainly; search"):
        assert_lossless(spec, 11, 5, 7, new_tokens=13)
    assert (spec.stats.policy, spec.stats.drafted) == (f"none: {reason}", 0)
    assert_lossless(spec, 11, 5, 7, new_tokens=13)
    assert_lossless(spec, 11, new_tokens=13)
    assert spec.stats.drafted > 0
    fixed = wrap(llama, plan(**changes), policy="fixed")
    assert_lossless(fixed, 11, 5, 7, new_tokens=13)
    assert fixed.stats.drafted > 0


def test_with_one_seed_sampled_text_is_the_same_every_time(llama: PreTrainedModel) -> None:
    tokens, mask = prompts(11)
    spec = wrap(llama, plan(round_costs=[round_costs(0.9)]))
    written = []
    for _ in range(2):
        torch.manual_seed(11)
        written.append(spec.generate(tokens, attention_mask=mask, do_sample=True, max_new_tokens=61))
    assert torch.equal(*written)


def test_an_unknown_policy_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="policy 'eager' is unknown; choose one of adaptive, fixed"):
        wrap(llama, plan(), policy="eager")  # type: ignore[arg-type]


def test_round_costs_shorter_than_gamma_or_longer_than_any_draft_are_refused() -> None:
    with pytest.raises(PlanError, match="gamma is 9, but its round_costs for 1 rows end at 7 drafted tokens"):
        Plan(skip_set=FIRST_DROPPED, gamma=9, round_costs=[round_costs(0.6)])
    too_long = round_costs(0.6).model_dump() | {"rounds": [1.0] * 66}
    with pytest.raises(PlanError, match=r"round_costs\.0\.rounds.*at most 65"):
        Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[too_long])


def test_round_costs_survive_the_plan_file() -> None:
    assert Plan.from_json(plan().to_json()) == plan()


def test_captured_rounds_draft_the_chosen_lengths_by_layers_with_one_lookup(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plan(prompt_lookup=PromptLookup(gamma=4), round_costs=[round_costs(0.9, matches=SHARES)])
    spec = SelfSpeculator(llama, one, recorder=TapeRecorder())
    lengths = []

    def alternate(self: AdaptivePolicy, rows: object) -> Choice:
        lengths.append((2, 3)[len(lengths) % 2])
        self._cost = 1.0
        return Choice(lengths[-1], lookup=4, least=8)

    monkeypatch.setattr(AdaptivePolicy, "choose", alternate)
    assert_lossless(spec, 11, new_tokens=41)
    drafted = [drafted for ((_, drafted, _),) in spec.stats.history]
    assert spec.stats.captured
    assert drafted[:-3] == lengths[:-3], "the limit cuts the last drafts"
