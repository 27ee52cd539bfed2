"""The policy: which draft length promises most, when not to draft at all, and that none of it changes the text."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from operator import mul

import pytest
import torch
from models import FIRST_DROPPED, damped_model, prompts
from tape import TapeRecorder
from transformers import PreTrainedModel

from selfspec import InputError, Plan, PlanError, SkipSet, wrap
from selfspec.graphs import Graphs
from selfspec.plan import Conditions, Outlook, PromptLookup, Provenance
from selfspec.policy import (
    FIRST_PROBE,
    LAST_PROBE,
    PRIOR,
    AdaptiveDrafter,
    AdaptivePolicy,
    AgreementEstimate,
    draft_lengths,
    drafter_for,
    obstacle_to_adapting,
)
from selfspec.runtime import Runtime

LONGEST = 7
ROUNDS = [1.0 + 0.11 * n for n in range(LONGEST + 1)]


def outlook(*agreement: float, draft_step: float = 0.3, rows: int = 1) -> Outlook:
    return Outlook(rows=rows, draft_step=draft_step, rounds=ROUNDS, agreement=list(agreement))


def policy(*agreement: float, gamma: int = 3, draft_step: float = 0.3) -> AdaptivePolicy:
    return AdaptivePolicy(outlook(*agreement, draft_step=draft_step), gamma, range(LONGEST + 1))


# --- The estimate ---


def test_without_evidence_the_estimate_is_the_plans_and_deeper_depths_are_like_its_last() -> None:
    estimate = AgreementEstimate([0.9, 0.7])
    assert [estimate[depth] for depth in range(4)] == pytest.approx([0.9, 0.7, 0.7, 0.7])
    assert estimate.tokens_per_round(3) == pytest.approx(1 + 0.9 + 0.9 * 0.7 + 0.9 * 0.7 * 0.7)


def test_one_round_counted_by_hand() -> None:
    estimate = AgreementEstimate([0.8, 0.5])
    estimate.observe(reached=2, accepted=1)  # the first was right, the second wrong
    level = (PRIOR + 1) / (PRIOR + 0.8 + 0.5)
    assert estimate[0] == pytest.approx((PRIOR * level * 0.8 + 1) / (PRIOR + 1))
    assert estimate[1] == pytest.approx((PRIOR * level * 0.5 + 0) / (PRIOR + 1))


@pytest.mark.parametrize("true", [0.2, 0.6, 0.97])
def test_the_estimate_follows_the_text_within_fifty_rounds(true: float) -> None:
    estimate, draws = AgreementEstimate([0.8, 0.8, 0.8]), random.Random(3)
    for _ in range(50):
        accepted = accepted_of(3, [true], draws)
        estimate.observe(min(3, accepted + 1), accepted)
    assert estimate[0] == pytest.approx(true, abs=0.15)


def test_depths_that_are_not_drafted_follow_those_that_are() -> None:
    estimate = AgreementEstimate([0.8, 0.7, 0.6])
    for _ in range(40):
        estimate.observe(reached=1, accepted=0)
    assert estimate[2] < 0.2


# --- The choice ---


@pytest.mark.parametrize("agreement", [0.05, 0.35, 0.6, 0.8, 0.93, 0.99])
def test_the_length_that_promises_most_is_chosen(agreement: float) -> None:
    chosen = policy(agreement, gamma=0)
    promised = [
        sum(accumulate([1.0] + [agreement] * n, mul)) / (0.3 * n + ROUNDS[n]) for n in range(LONGEST + 1)
    ]  # tokens by seconds
    assert promised[chosen.choose()] == pytest.approx(max(promised))


def test_a_length_that_promises_hardly_more_is_not_worth_a_change() -> None:
    promised = [policy(0.8).tokens_per_second(n) for n in range(LONGEST + 1)]
    best = promised.index(max(promised))
    near = next(n for n in range(1, LONGEST) if n != best and promised[n] > promised[best] * 0.985)
    assert policy(0.8, gamma=near).choose() == near
    far = next(n for n in range(LONGEST + 1) if promised[n] < promised[best] * 0.95)
    assert policy(0.8, gamma=far).choose() == best


def test_where_drafts_never_pay_probes_become_rare() -> None:
    plain = policy(0.01)
    probes = []
    for number in range(3000):
        gamma = plain.choose()
        plain.observe([(gamma, 0, 1)])
        if gamma:
            assert gamma == 1, "the shortest draft is the cheapest to try"
            probes.append(number)
    waits = [later - earlier - 1 for earlier, later in pairwise(probes)]
    assert probes[0] == FIRST_PROBE
    assert waits[:3] == [2 * FIRST_PROBE, 4 * FIRST_PROBE, 8 * FIRST_PROBE]
    assert max(waits) == LAST_PROBE


def test_drafting_is_taken_up_again_when_the_text_becomes_easy() -> None:
    one = policy(0.9)
    for _ in range(200):
        gamma = one.choose()
        one.observe([(gamma, 0, 1)])
    assert one.gamma == 0
    rounds = 0
    while one.gamma < 3 and rounds < 2 * LAST_PROBE:
        gamma = one.choose()
        one.observe([(gamma, gamma, gamma + 1)])
        rounds += 1
    assert rounds < LAST_PROBE


def test_what_stands_behind_a_stop_token_is_no_evidence() -> None:
    one = policy(0.8)
    one.observe([(3, 1, 1)])  # the first accepted token ended the row
    assert one.agreement._reached == [1.0]
    deeper = policy(0.8, 0.8, 0.8)
    deeper.observe([(3, 1, 1)])
    assert deeper.agreement._reached == [1.0, 0.0, 0.0]


def accepted_of(gamma: int, agreement: list[float], draws: random.Random) -> int:
    accepted = 0
    while accepted < gamma and draws.random() < agreement[min(accepted, len(agreement) - 1)]:
        accepted += 1
    return accepted


def priced(
    texts: list[tuple[int, float]], choose: AdaptivePolicy | int, draft_step: float = 0.3, seed: int = 5
) -> float:
    """Tokens per priced second over stretches of text of so many tokens and such agreement."""
    draws, tokens, seconds = random.Random(seed), 0, 0.0
    for length, agreement in texts:
        written = 0
        while written < length:
            gamma = choose if isinstance(choose, int) else choose.choose()
            accepted = accepted_of(gamma, [agreement], draws)
            if not isinstance(choose, int):
                choose.observe([(gamma, accepted, accepted + 1)])
            written, seconds = written + accepted + 1, seconds + draft_step * gamma + ROUNDS[gamma]
        tokens += written
    return tokens / seconds


MIXED = [(2000, 0.95), (2000, 0.1), (2000, 0.6)] * 3


@pytest.mark.parametrize("draft_step", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("agreement", [0.05, 0.3, 0.5, 0.7, 0.8, 0.95])
def test_on_text_of_one_kind_it_stays_near_the_best_length_and_never_falls_behind_plain(
    agreement: float, draft_step: float
) -> None:
    text = [(20_000, agreement)]
    fixed = [priced(text, gamma, draft_step) for gamma in range(LONGEST + 1)]
    adaptive = priced(text, policy(0.9, draft_step=draft_step), draft_step)
    assert adaptive > 0.95 * max(fixed)
    assert adaptive > 0.98 * fixed[0]


def test_on_mixed_text_it_beats_every_length() -> None:
    assert priced(MIXED, policy(0.8)) > max(priced(MIXED, gamma) for gamma in range(LONGEST + 1))


# --- Whom it serves ---


def plan(**changes: object) -> Plan:
    return Plan(skip_set=FIRST_DROPPED, gamma=3, outlook=outlook(0.6)).model_copy(update=changes)


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
        ({"outlook": None}, "does not say what drafts of other lengths cost"),
        ({"gamma": 0, "skip_set": SkipSet()}, "does not say what drafts of other lengths cost"),
        ({"exit_threshold": 0.4}, "adapts by itself"),
        ({"prompt_lookup": PromptLookup(gamma=2)}, "adapts by itself"),
        ({"outlook": outlook(0.6, rows=4)}, "knows what 4 rows cost, not 1"),
        ({"provenance": conditions(dtype="bfloat16")}, "dtype bfloat16, here float32"),
        ({"provenance": conditions(device="NVIDIA H200")}, "device NVIDIA H200, here cpu"),
    ],
)
def test_it_adapts_only_where_the_plans_costs_hold(
    changes: dict[str, object], reason: str | None, llama: PreTrainedModel
) -> None:
    runtime = Runtime(llama, FIRST_DROPPED)
    obstacle = obstacle_to_adapting(plan(**changes), runtime, rows=1)
    assert (obstacle is None) == (reason is None)
    assert reason is None or reason in str(obstacle)
    drafter, words = drafter_for(plan(**changes), runtime, 1, "adaptive")
    assert isinstance(drafter, AdaptiveDrafter) == (reason is None)
    assert words == ("adaptive" if reason is None else f"fixed: {obstacle}")
    drafter, words = drafter_for(plan(**changes), runtime, 1, "fixed")
    assert not isinstance(drafter, AdaptiveDrafter)
    assert words == "fixed"


@pytest.mark.parametrize(
    ("gamma", "longest", "lengths"), [(3, 7, [0, 2, 3, 6]), (1, 1, [0, 1]), (5, 7, [0, 3, 5, 7]), (7, 7, [0, 4, 7])]
)
def test_few_lengths_are_the_plans_half_and_double(gamma: int, longest: int, lengths: list[int]) -> None:
    assert draft_lengths(gamma, longest, few=True) == lengths
    assert draft_lengths(gamma, longest, few=False) == list(range(longest + 1))


@pytest.mark.parametrize("captured", [False, True])
def test_the_text_is_the_models_whatever_is_chosen(captured: bool, llama: PreTrainedModel) -> None:
    tokens, mask = prompts(11)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 173}
    spec = wrap(llama, plan(outlook=outlook(0.9, 0.8, draft_step=0.15)))
    if captured:
        spec.runtime.graphs = Graphs(TapeRecorder())
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
    spec = wrap(llama, plan(outlook=outlook(0.9, rows=3)))
    assert torch.equal(spec.generate(tokens, **options), llama.generate(tokens, **options))
    assert len(spec.stats.choices) > 1


def test_with_one_seed_sampled_text_is_the_same_every_time(llama: PreTrainedModel) -> None:
    tokens, mask = prompts(11)
    spec = wrap(llama, plan(outlook=outlook(0.9)))
    written = []
    for _ in range(2):
        torch.manual_seed(11)
        written.append(spec.generate(tokens, attention_mask=mask, do_sample=True, max_new_tokens=61))
    assert torch.equal(*written)


def test_an_unknown_policy_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="policy 'eager' is unknown; choose one of adaptive, fixed"):
        wrap(llama, plan(), policy="eager")  # type: ignore[arg-type]


def test_an_outlook_that_ends_before_gamma_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="gamma is 9, but its outlook has costs of rounds over up to 7 drafted tokens"):
        Plan(skip_set=FIRST_DROPPED, gamma=9, outlook=outlook(0.6))


def test_an_outlook_comes_back_from_its_file_as_it_was() -> None:
    one = plan()
    assert Plan.from_json(one.to_json()) == one
