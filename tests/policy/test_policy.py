"""The policy: which drafter and draft length it chooses, when it decodes plainly; the text stays the model's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul

import pytest
import torch
from models import FIRST_DROPPED, damped_model, prompts
from tape import TapeRecorder
from transformers import PreTrainedModel

from selfspec import InputError, Plan, PlanError, PlanWarning, SelfSpeculator, SkipSet, wrap
from selfspec.plan import MATCHES, Conditions, PromptLookup, Provenance, RoundCosts, match_class
from selfspec.policy import (
    AdaptiveDrafter,
    AdaptivePolicy,
    AgreementEstimate,
    Choice,
    Row,
    Seen,
    drafter_for,
    unsupported_reason,
)
from selfspec.policy.policy import FIRST_WAIT, LONGEST_WAIT
from selfspec.runtime.runtime import Runtime

LONGEST = 7
ROUNDS = [1.0 + 0.11 * n for n in range(LONGEST + 1)]
LOOKUPS = (1, 2, 3, 4, 6, LONGEST)
SHARES = [[0.3, 0.6], [0.4, 0.7], [0.5, 0.75], [0.6, 0.8], [0.8, 0.9]]
"""Of looked-up tokens, by length class."""


def round_costs(*agreement: float, draft_step: float = 0.3, rows: int = 1, **more: object) -> RoundCosts:
    return RoundCosts(rows=rows, draft_step=draft_step, rounds=ROUNDS, agreement=list(agreement), **more)


def policy_with_lookup(agreement: float, **more: object) -> AdaptivePolicy:
    return AdaptivePolicy(
        round_costs(agreement, **{"matches": SHARES, "lookup": 0.01} | more), range(LONGEST + 1), LOOKUPS
    )


class Layers:
    """A policy that chooses among drafts by layers alone, for one row."""

    def __init__(self, *agreement: float, draft_step: float = 0.3) -> None:
        self.policy = AdaptivePolicy(round_costs(*agreement, draft_step=draft_step), range(LONGEST + 1))

    def round(self, accepted: int = LONGEST) -> int:
        """Decode one round, in which up to `accepted` tokens are accepted; the draft length."""
        drafted = self.policy.choose([Row()]).layers
        self.policy.observe([Seen(drafted, min(accepted, drafted), 1 + min(accepted, drafted))])
        return drafted


# --- The estimate ---


def test_without_evidence_the_estimate_is_the_plans_and_deeper_depths_are_like_its_last() -> None:
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


def test_depths_that_are_not_drafted_follow_those_that_are() -> None:
    estimate = AgreementEstimate([0.8, 0.7, 0.6], longest=3)
    for _ in range(50):
        estimate.observe([(1, 0)])
    assert estimate[2] < 0.2


def test_the_first_looked_up_token_is_judged_apart_from_later_ones() -> None:
    estimate = AgreementEstimate([0.5, 0.8], longest=LONGEST)
    for _ in range(200):
        estimate.observe([(4, 3)])
    assert estimate[0] == pytest.approx(1, abs=0.02)
    assert [estimate[depth] for depth in (1, LONGEST - 1)] == pytest.approx([2 / 3] * 2, abs=0.08)


def test_matches_are_told_apart_by_length() -> None:
    assert [match_class(n) for n in (1, 2, 3, 4, 5, 7, 8, 50)] == [0, 1, 2, 2, 3, 3, 4, 4]


# --- The choice ---


@pytest.mark.parametrize("agreement", [0.05, 0.35, 0.6, 0.8, 0.93, 0.99])
def test_the_length_that_promises_most_is_chosen(agreement: float) -> None:
    promised = [
        sum(accumulate([1.0] + [agreement] * n, mul)) / (0.3 * n + ROUNDS[n]) for n in range(LONGEST + 1)
    ]  # tokens by seconds
    assert promised[Layers(agreement).round()] == pytest.approx(max(promised))


def test_another_choice_must_promise_distinctly_more() -> None:
    def lengths(last: int) -> list[int]:
        """Chosen at rising agreement, and then at falling agreement, each time after `last`."""
        chosen = []
        for agreement in (0.6, 0.65, 0.7, 0.75, 0.8):
            one = Layers(agreement).policy
            one._chosen = {-1: Choice(last)}
            chosen.append(one.choose([Row()]).layers)
        return chosen

    assert lengths(1) != lengths(2) != lengths(3), (
        "between two lengths that promise nearly the same, the last one stays"
    )
    assert lengths(0) == lengths(7), "a length that promises distinctly less never stays"


@pytest.mark.parametrize("draft_step", [0.1, 0.3, 0.6])
def test_where_drafts_never_pay_each_probe_waits_twice_as_long_as_the_last(draft_step: float) -> None:
    plain = Layers(0.01, draft_step=draft_step)
    probes = [number for number in range(1500) if plain.round(accepted=0)]
    assert probes[0] == FIRST_WAIT
    waits = [later - earlier - 1 for earlier, later in pairwise(probes)]
    assert waits[:3] == [2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT]
    assert max(waits) == LONGEST_WAIT


def test_drafting_is_taken_up_again_when_the_text_becomes_easy() -> None:
    one = Layers(0.9)
    for _ in range(200):
        one.round(accepted=0)
    assert next(n for n in range(500) if one.round() >= 3) < 1.5 * LONGEST_WAIT


def test_drafting_is_given_up_within_a_few_rounds_when_the_text_becomes_hard() -> None:
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
def test_what_stands_behind_a_stop_token_is_no_evidence(agreement: list[float]) -> None:
    one, same = (AdaptivePolicy(round_costs(*agreement), [3]) for _ in range(2))
    for policy, seen in ((one, Seen(3, 1, 1)), (same, Seen(1, 1, 1))):
        policy.choose([Row()])
        policy.observe([seen])  # the first accepted token ended the row
    assert one.agreement.tokens == same.agreement.tokens


def test_lookup_drafts_behind_matches_that_are_right_and_not_behind_others() -> None:
    one, long, short = policy_with_lookup(0.3), Row(LONGEST, 8), Row(LONGEST, 1)
    for _ in range(60):
        for row, right in ((long, LONGEST), (short, 0)):
            one.choose([row])
            one.observe([Seen(0, 0, right + 1, *row, right)])
    assert one.choose([long]).lookup >= 4
    assert not one.choose([short]).lookup


def test_prompt_lookup_is_judged_also_while_layers_draft() -> None:
    one, row, rounds = policy_with_lookup(0.9, matches=[[0.01, 0.01]] * 5), Row(LONGEST, 8), 0
    assert not one.choose([row]).lookup
    while not (choice := one.choose([row])).lookup and rounds < 50:
        accepted = min(choice.layers, 2)
        one.observe([Seen(choice.layers, accepted, accepted + 1, *row, accepted + 1)])
        rounds += 1
    assert rounds < 20
    assert any("match of 8 or more: lookup" in change for change in one.changes)


def test_rows_without_a_match_draft_by_layers_beside_rows_that_look_up() -> None:
    one = policy_with_lookup(0.7, rows=3, draft_step=0.05, matches=[[0.99, 0.99]] * 5)
    chosen = one.choose([Row(LONGEST, 8), Row(LONGEST, 8), Row()])
    assert chosen.lookup
    assert chosen.layers


def test_layers_are_not_probed_where_lookup_is_better_than_they_could_be() -> None:
    one, row = policy_with_lookup(0.9, draft_step=0.5), Row(LONGEST, 8)
    for number in range(560):
        assert one.choose([row]).lookup == LONGEST or number < 60
        one.observe([Seen(0, 0, LONGEST + 1, *row, LONGEST)])


@pytest.mark.parametrize(("matched", "looks"), [(3, False), (4, True)])
def test_a_least_match_between_the_classes_counts_too(matched: int, looks: bool) -> None:
    one = AdaptivePolicy(round_costs(0.1, matches=[[0.99, 0.99]] * 5), [0, 3], LOOKUPS, leasts=[4])
    assert bool(one.choose([Row(LONGEST, matched)]).lookup) == looks


# --- Priced, on simulated text ---

KINDS = {
    # agreement; how often there is a match, of what lengths, how often its first token is right and the later ones are
    "prose": (0.3, 0.3, (4, 3, 2, 1, 1), (0.1, 0.15, 0.2, 0.3, 0.4), 0.5),
    "code": (0.8, 0.5, (4, 3, 2, 1, 1), (0.2, 0.3, 0.4, 0.5, 0.6), 0.7),
    "copy": (0.8, 0.97, (1, 1, 2, 2, 4), (0.5, 0.7, 0.8, 0.95, 0.98), 0.97),
    "hard": (0.02, 1.0, (1, 0, 0, 0, 0), (0.02,) * 5, 0.5),
    "easy": (0.97, 1.0, (1, 0, 0, 0, 0), (0.02,) * 5, 0.5),
}
MIXED = [("prose", 150), ("code", 150), ("copy", 150)] * 10
FIXED = {
    "none": Choice(),
    **{f"layers {n}": Choice(n) for n in (1, 2, 3, 4, 6)},
    **{f"lookup {n} from {m}": Choice(0, n, m) for n in (3, LONGEST) for m in (1, 2, 3)},
    **{f"lookup {n} from {m}, layers {g}": Choice(g, n, m) for n in (3, LONGEST) for m in (1, 3) for g in (2, 4)},
}


def run(most: int, first: float, later: float, draws: random.Random) -> int:
    accepted = 0
    while accepted < most and draws.random() < (later if accepted else first):
        accepted += 1
    return accepted


def priced(texts: Sequence[tuple[str, int]], chooser: AdaptivePolicy | Choice, costs: RoundCosts) -> float:
    """Tokens per priced second over stretches of text of so many tokens a row, each of one kind."""
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
                if choice.lookup and row.found and row.matched >= choice.least:
                    by_layers, accepted, longest = 0, min(runs, choice.lookup), max(longest, choice.lookup)
                else:
                    by_layers, accepted = choice.layers, run(choice.layers, agreement, agreement, draws)
                    steps = choice.layers
                seen.append(Seen(by_layers, accepted if by_layers else 0, accepted + 1, *row, min(runs, accepted + 1)))
            tokens += sum(row.committed for row in seen)
            seconds += costs.rounds[max(steps, longest)] + steps * costs.draft_step + costs.lookup
            if isinstance(chooser, AdaptivePolicy):
                chooser.observe(seen)
    return tokens / seconds


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("draft_step", [0.3, 0.7])
@pytest.mark.parametrize("kind", ["prose", "code", "copy", "mixed"])
def test_it_stays_near_the_best_fixed_choice_and_on_mixed_text_no_fixed_choice_is_as_good(
    kind: str, draft_step: float, rows: int
) -> None:
    texts = MIXED if kind == "mixed" else [(kind, 4000)]
    one = policy_with_lookup(0.7, draft_step=draft_step, rows=rows)
    fixed = {name: priced(texts, choice, one.round_costs) for name, choice in FIXED.items()}
    adaptive = priced(texts, one, one.round_costs)
    assert adaptive > (0.99 if kind == "mixed" else 0.96) * max(fixed.values()), fixed
    assert adaptive > 0.98 * fixed["none"]


@pytest.mark.parametrize("draft_step", [0.1, 0.7])
@pytest.mark.parametrize(
    ("hit", "lengths"), [(1.0, (0, 0, 0, 0, 1)), (1.0, (1, 0, 0, 0, 0)), (0.3, (1, 1, 1, 1, 1)), (0.0, (1, 1, 1, 1, 1))]
)
def test_where_everything_is_always_wrong_it_is_hardly_slower_than_plain(
    hit: float, lengths: tuple[int, ...], draft_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "hopeless", (0.0, hit, lengths, (0.0,) * 5, 0.0))
    one = policy_with_lookup(0.95, draft_step=draft_step)
    plain = priced([("hopeless", 3000)], Choice(), one.round_costs)
    assert priced([("hopeless", 3000)], one, one.round_costs) > 0.98 * plain


def test_it_does_not_flap() -> None:
    one = policy_with_lookup(0.7)
    priced([("code", 1500)], one, one.round_costs)
    assert len(one.changes) < 126, "a fifth of 630 rounds"


def test_layers_come_back_where_every_round_has_a_match_that_is_wrong() -> None:
    one = policy_with_lookup(0.7)
    priced([("hard", 600)], one, one.round_costs)
    assert not one.choose([Row(LONGEST, 1)]).layers
    one.observe([Seen(0, 0, 1, LONGEST, 1, 0)])
    assert priced([("easy", 2000)], one, one.round_costs) > 1.4, "tokens in the time of a plain pass"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("agreement", [[0.0], [0.0, 0.0, 0.0], [1.0], [1.0] * 11])
@pytest.mark.parametrize("matches", [[], [[0.0, 0.0]] * 5, [[1.0, 1.0]] * 5])
def test_estimates_stay_numbers_in_any_batch_to_its_last_token(
    static: bool, agreement: list[float], matches: list[list[float]]
) -> None:
    draws, here = (
        random.Random(7),
        RoundCosts(rows=5, draft_step=0.0, rounds=ROUNDS, agreement=agreement, matches=matches),
    )
    one = AdaptivePolicy(here, range(LONGEST + 1), LOOKUPS if matches else (), static=static)
    for left in [LONGEST] * 200 + list(range(LONGEST, -1, -1)) * 13:
        rows = [Row(draws.randrange(left + 1) * bool(matches), draws.randrange(1, 11)) for _ in range(5 - left % 3)]
        choice, seen = one.choose(rows), []
        for row in rows:
            looks = choice.lookup and row.found and row.matched >= choice.least
            drafted = min(choice.lookup, row.found) if looks else min(choice.layers, left)
            accepted = draws.randrange(drafted + 1)
            by_layers = (0, 0) if looks else (drafted, accepted)
            seen.append(Seen(*by_layers, accepted + 1, *row, min(row.found, accepted)))
        one.observe(seen)
        assert 0 < one.speed < float("inf")
        assert all(0 <= each[depth] <= 1 for each in (one.agreement, *one.matches) for depth in range(13))


# --- Which requests it serves ---


def plan(**changes: object) -> Plan:
    return Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[round_costs(0.6)]).model_copy(update=changes)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return damped_model("llama", FIRST_DROPPED)


def conditions(**changes: object) -> Provenance:
    found = Conditions(device="cpu", dtype="float32").model_copy(update=changes)
    return Provenance(conditions=found, seed=0, trials=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"provenance": conditions()}, None),
        ({"round_costs": []}, "does not say what drafts of other lengths cost"),
        ({"gamma": 0, "skip_set": SkipSet(), "round_costs": [round_costs(0.6, matches=[[0.4, 0.8]] * 5)]}, None),
        ({"gamma": 0, "skip_set": SkipSet(), "round_costs": []}, "never drafts"),
        ({"exit_threshold": 0.4}, "adapts by itself"),
        ({"prompt_lookup": PromptLookup(gamma=2)}, "does not say what to expect of prompt lookup"),
        ({"prompt_lookup": PromptLookup(gamma=2), "round_costs": [round_costs(0.6, matches=[[0.4, 0.8]] * 5)]}, None),
        ({"round_costs": [round_costs(0.6, rows=4)]}, "knows what 4 rows cost, not 1"),
        ({"round_costs": [round_costs(0.6, rows=4), *[round_costs(0.6)]]}, None),
        ({"provenance": conditions(dtype="bfloat16")}, "dtype bfloat16, here float32"),
        ({"provenance": conditions(device="NVIDIA H200")}, "device NVIDIA H200, here cpu"),
    ],
)
def test_it_adapts_only_where_the_plans_costs_hold(
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


def test_few_lengths_compete_where_each_must_be_captured(llama: PreTrainedModel) -> None:
    runtime = Runtime(llama, FIRST_DROPPED)
    both = plan(prompt_lookup=PromptLookup(gamma=5, min_ngram=3), round_costs=[round_costs(0.6, matches=SHARES)])

    def competing(one: Plan) -> tuple[list[int], list[int], list[int]]:
        drafter, _ = drafter_for(one, runtime, 1, "adaptive")
        assert isinstance(drafter, AdaptiveDrafter)
        return list(drafter.policy.layers), list(drafter.policy.lookups), list(drafter.policy.leasts)

    assert competing(both) == (list(range(LONGEST + 1)), list(range(1, LONGEST + 1)), list(MATCHES))
    runtime = Runtime(llama, graphs=TapeRecorder())
    assert competing(both) == ([0, 2, 3, 6], [5], [3])
    assert competing(plan(gamma=5, round_costs=[round_costs(0.6, matches=SHARES)])) == ([0, 3, 5, 7], [7], [2])
    assert competing(plan(gamma=7)) == ([0, 4, 7], [], [2])


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_text_is_the_models_whatever_is_chosen(captured: bool, llama: PreTrainedModel) -> None:
    tokens, mask = prompts(11)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 173}
    one = plan(round_costs=[round_costs(0.9, 0.8, draft_step=0.15, matches=SHARES)])
    spec = SelfSpeculator(llama, one, recorder=TapeRecorder() if captured else None)
    expected = llama.generate(tokens, **options)
    assert torch.equal(spec.generate(tokens, **options), expected)
    lengths = dict(spec.stats.choices)
    assert len(lengths) > 1, f"only drafts of {lengths} were tried"
    assert sum(lengths.values()) == spec.stats.passes
    assert spec.stats.policy == "adaptive"
    assert torch.equal(spec.generate(tokens, **options), expected)
    assert spec.stats.choices == lengths, "the same request is decoded the same way"


def test_batches_adapt_together(llama: PreTrainedModel) -> None:
    tokens, mask = prompts(11, 5, 7)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 61}
    spec = wrap(llama, plan(round_costs=[round_costs(0.9, rows=3)]))
    assert torch.equal(spec.generate(tokens, **options), llama.generate(tokens, **options))
    assert len(spec.stats.choices) > 1


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, "1 row"),
        ({"round_costs": [round_costs(0.6), round_costs(0.6, rows=2)]}, "1 and 2 rows"),
        ({"round_costs": [], "exit_threshold": 0.01, "provenance": conditions(rows=2)}, "2 rows"),
    ],
)
def test_more_rows_than_have_a_price_are_decoded_plainly_and_told_once(
    changes: dict[str, object], known: str, llama: PreTrainedModel
) -> None:
    tokens, mask = prompts(11, 5, 7)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 13}
    spec, expected = wrap(llama, plan(**changes)), llama.generate(tokens, **options)
    with pytest.warns(
        PlanWarning, match=f"the plan knows what {known} cost, not 3, so they are decoded plainly; search"
    ):
        assert torch.equal(spec.generate(tokens, **options), expected)
    assert (spec.stats.policy, spec.stats.drafted) == (f"none: the plan knows what {known} cost, not 3", 0)
    spec.generate(tokens, **options)
    spec.generate(tokens[:1], attention_mask=mask[:1], do_sample=False, max_new_tokens=13)
    assert spec.stats.drafted > 0
    kept = wrap(llama, plan(**changes), policy="fixed")
    assert torch.equal(kept.generate(tokens, **options), expected)
    assert kept.stats.drafted > 0


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


def test_round_costs_that_end_before_gamma_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="gamma is 9, but its round_costs for 1 rows end at 7 drafted tokens"):
        Plan(skip_set=FIRST_DROPPED, gamma=9, round_costs=[round_costs(0.6)])


def test_round_costs_of_rounds_longer_than_any_draft_are_refused() -> None:
    data = round_costs(0.6).model_dump() | {"rounds": [1.0] * 66}
    with pytest.raises(PlanError, match=r"round_costs\.0\.rounds.*at most 65"):
        Plan(skip_set=FIRST_DROPPED, gamma=3, round_costs=[data])


def test_round_costs_come_back_from_their_file_as_they_were() -> None:
    one = plan()
    assert Plan.from_json(one.to_json()) == one


def test_captured_rounds_draft_as_far_as_was_chosen_beside_the_same_lookup(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask = prompts(11)
    one = plan(prompt_lookup=PromptLookup(gamma=4), round_costs=[round_costs(0.9, matches=[[0.4, 0.8]] * 5)])
    spec = SelfSpeculator(llama, one, recorder=TapeRecorder())
    lengths = []

    def alternate(self: AdaptivePolicy, rows: object) -> Choice:
        lengths.append((2, 3)[len(lengths) % 2])
        self._cost = 1.0
        return Choice(lengths[-1], lookup=4, least=8)

    monkeypatch.setattr(AdaptivePolicy, "choose", alternate)
    spec.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=41)
    drafted = [drafted for ((_, drafted, _),) in spec.stats.history]
    assert spec.stats.captured
    assert drafted[:-3] == lengths[:-3], "the last ones are cut by the limit"
