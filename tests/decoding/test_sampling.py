"""Acceptance, by chi-square: the tokens that a round commits follow p, for every q."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPTIONS, V, assert_follows, assert_sampled_texts_follow
from models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers import generation as hf

from selfspec import Plan, SkipSet, wrap
from selfspec.decoding.acceptance import Acceptance, Draft, accept
from selfspec.decoding.logits_processors import process
from selfspec.decoding.sampling import next_tokens, sample
from selfspec.plan.lookup import PromptLookup

N = 3  # drafted a round
ROUNDS = 30_011

PROCESSORS: dict[str, hf.LogitsProcessor] = {
    "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor(1.7),
    "temperature": hf.TemperatureLogitsWarper(0.7),
    "top_k": hf.TopKLogitsWarper(4),
    "top_p": hf.TopPLogitsWarper(0.9),
    "min_p": hf.MinPLogitsWarper(0.15),
}
CHAINS: dict[str, list[hf.LogitsProcessor]] = {
    "plain": [],
    **{name: [processor] for name, processor in PROCESSORS.items()},
    "all together": list(PROCESSORS.values()),
}


def test_the_chi_square_test_rejects_a_distribution_that_is_close() -> None:
    torch.manual_seed(2)
    p = torch.tensor([[0.5, 0.3, 0.2]])
    counts = torch.bincount(sample(torch.tensor([0.52, 0.29, 0.19]).expand(ROUNDS, 3)), minlength=3)[None]
    with pytest.raises(AssertionError, match="chi-square"):
        assert_follows(counts, p)


# --- Rounds of a toy: p and q each depend on the token before, processors on all tokens before ---


@dataclass
class Rounds:
    """Many rounds from one prompt, and the distributions they should follow."""

    draft: Draft
    acceptance: Acceptance
    target: Tensor  # v v, the target's logits after each token
    drafter: Tensor  # v v
    processors: list[hf.LogitsProcessor]

    def distribution(self, logits: Tensor, prefix: tuple[int, ...]) -> Tensor:
        """p or q after the prompt (token 0) and `prefix`, by Hugging Face's own list of processors."""
        context = torch.tensor([[0, *prefix]])
        scores = hf.LogitsProcessorList(self.processors)(context, logits[context[:, -1]])
        return torch.softmax(scores[0], dim=-1)

    def by_prefix(self, position: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`(rows, p, q)` for each prefix of `position` accepted tokens: rows is a mask."""
        groups = []
        for prefix in itertools.product(range(V), repeat=position):
            rows = (self.acceptance.accepted >= position) & (
                self.draft.tokens[:, :position] == torch.tensor(prefix, dtype=torch.long)
            ).all(dim=1)
            groups.append((rows, self.distribution(self.target, prefix), self.distribution(self.drafter, prefix)))
        return groups

    def assert_tokens_follow_p(self, position: int) -> None:
        """The tokens committed at `position`, in the rounds that got there: accepted, recovered or bonus."""
        drafted = torch.nn.functional.pad(self.draft.tokens, (0, 1))[:, position]
        tokens = torch.where(self.acceptance.accepted > position, drafted, self.acceptance.following)
        groups = self.by_prefix(position)
        counts = [torch.bincount(tokens[rows], minlength=V) for rows, _, _ in groups]
        assert_follows(torch.stack(counts), torch.stack([p for _, p, _ in groups]))

    def assert_accepted_follow_the_overlap(self, position: int) -> None:
        passed, groups = self.acceptance.accepted > position, self.by_prefix(position)
        counts = [torch.bincount(self.draft.tokens[rows & passed, position], minlength=V) for rows, _, _ in groups]
        overlaps = [torch.minimum(p, q) for _, p, q in groups]
        assert_follows(torch.stack(counts), torch.stack([overlap / overlap.sum() for overlap in overlaps]))

    def assert_recovered_follow_the_residual(self, position: int) -> None:
        failed = (self.acceptance.accepted == position) & (self.draft.lengths > position)
        groups = self.by_prefix(position)
        counts = [torch.bincount(self.acceptance.following[rows & failed], minlength=V) for rows, _, _ in groups]
        residuals = [(p - q).clamp(min=0) for _, p, q in groups]
        assert_follows(torch.stack(counts), torch.stack([residual / residual.sum() for residual in residuals]))


def play(processors: list[hf.LogitsProcessor], lengths: Tensor | None = None) -> Rounds:
    """Draft and accept as the runtime does: every processor on both p and q, each after its own tokens."""
    torch.manual_seed(3)
    target = torch.randn(V, V)
    drafter = target + 0.6 * torch.randn(V, V)
    sequences = torch.zeros(ROUNDS, 1 + N, dtype=torch.long)
    chain, probs = hf.LogitsProcessorList(processors), []
    ends = torch.ones(ROUNDS, 1, dtype=torch.long)
    for step in range(N):
        logits = drafter[sequences[:, step]][:, None]
        scores = process(chain, logits, sequences, ends + step)[:, 0]
        sequences[:, step + 1], q = next_tokens(scores, sampling=True)
        assert q is not None
        probs.append(q)
    lengths = torch.full((ROUNDS,), N) if lengths is None else lengths
    draft = Draft(sequences[:, 1:], lengths, torch.stack(probs, dim=1))
    scores = process(chain, target[sequences], sequences, ends + torch.arange(N + 1))
    return Rounds(draft, accept(draft, scores, sampling=True), target, drafter, processors)


@pytest.fixture(scope="module", params=CHAINS)
def rounds(request: pytest.FixtureRequest) -> Rounds:
    return play(CHAINS[request.param])


@pytest.mark.parametrize("position", range(N + 1), ids=[*map(str, range(N)), "bonus"])
def test_accepted_recovered_and_bonus_tokens_together_follow_p_at_every_position(rounds: Rounds, position: int) -> None:
    rounds.assert_tokens_follow_p(position)


@pytest.mark.parametrize("position", range(2))
def test_accepted_tokens_follow_the_overlap_and_recovered_tokens_the_residual(rounds: Rounds, position: int) -> None:
    rounds.assert_accepted_follow_the_overlap(position)
    rounds.assert_recovered_follow_the_residual(position)


def test_a_row_with_a_shorter_draft_gets_its_bonus_token_at_its_own_length() -> None:
    lengths = torch.arange(ROUNDS) % (N + 1)
    rounds = play([], lengths)
    assert (rounds.acceptance.accepted <= lengths).all()
    for position in range(N + 1):
        rounds.assert_tokens_follow_p(position)
    for length in range(N + 1):  # and rows of each length by themselves: no bias by length
        rows = lengths == length
        own = replace(
            rounds,
            draft=Draft(rounds.draft.tokens[rows], lengths[rows], None),
            acceptance=Acceptance(rounds.acceptance.accepted[rows], rounds.acceptance.following[rows]),
        )
        own.assert_tokens_follow_p(0)
        own.assert_tokens_follow_p(length)


# --- Corners ---


def one_step(p: Tensor, q: Tensor | None, drafted: Tensor) -> Acceptance:
    """Accept one drafted token a row, from p (`v`) and q (`v`); the bonus would come from p too."""
    rows = len(drafted)
    probs = None if q is None else q.expand(rows, 1, -1)
    draft = Draft(drafted[:, None], torch.ones(rows, dtype=torch.long), probs)
    return accept(draft, p.log().expand(rows, 2, -1), sampling=True)


def counted(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=V)[None]


P = torch.tensor([0.37, 0.29, 0.0, 0.21, 0.13])


def test_a_draft_that_equals_the_target_is_always_accepted() -> None:
    torch.manual_seed(5)
    q = torch.softmax(P.log(), dim=-1)
    acceptance = one_step(P, q, sample(q.expand(ROUNDS, V)))
    assert acceptance.accepted.all()
    assert_follows(counted(acceptance.following), P[None])


def test_a_draft_that_shares_no_token_with_the_target_is_never_accepted() -> None:
    torch.manual_seed(7)
    q = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    acceptance = one_step(P, q, torch.full((ROUNDS,), 2))
    assert not acceptance.accepted.any()
    assert_follows(counted(acceptance.following), P[None])


@pytest.mark.parametrize("given", ["as probabilities", "as tokens alone"])
def test_a_one_hot_draft_is_accepted_with_the_probability_that_p_gives_it(given: str) -> None:
    torch.manual_seed(11)
    q = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    acceptance = one_step(P, q if given == "as probabilities" else None, torch.full((ROUNDS,), 1))
    passed = acceptance.accepted == 1
    assert_follows(torch.stack([passed.sum(), (~passed).sum()])[None], torch.tensor([[0.29, 0.71]]))
    without = torch.where(q > 0, 0.0, P)
    assert_follows(counted(acceptance.following[~passed]), without[None] / without.sum())
    assert_follows(counted(acceptance.following[passed]), P[None])


def test_where_rounding_leaves_no_residual_the_token_is_drawn_from_p() -> None:
    torch.manual_seed(13)
    q = P * 1.5  # rounding at its worst: q exceeds p everywhere, so tokens fail although no residual is left
    acceptance = one_step(P, q, sample(P.expand(ROUNDS, V)))
    assert not acceptance.accepted.all()
    assert_follows(counted(acceptance.following[acceptance.accepted == 0]), P[None])


def test_an_empty_draft_draws_from_p() -> None:
    torch.manual_seed(17)
    scores = P.log().expand(ROUNDS, 1, -1)
    acceptance = accept(Draft.empty(ROUNDS, scores.device), scores, sampling=True)
    assert not acceptance.accepted.any()
    assert_follows(counted(acceptance.following), P[None])


@pytest.mark.parametrize("sampling", [True, False])
def test_padding_a_draft_changes_no_row(sampling: bool) -> None:
    torch.manual_seed(19)
    q = torch.softmax(torch.randn(ROUNDS, 2, V), dim=-1)
    draft = Draft(sample(q), torch.arange(ROUNDS) % 3, q if sampling else None)
    scores = torch.randn(V).expand(ROUNDS, 5, -1)
    padded = accept(draft.padded(4), scores, sampling=sampling)
    assert (padded.accepted <= draft.lengths).all()
    if sampling:
        assert_follows(counted(padded.following[draft.lengths == 0]), torch.softmax(scores[0, 0], -1)[None])
    else:
        plain = accept(draft, scores[:, :3], sampling=False)
        assert torch.equal(plain.accepted, padded.accepted)
        assert torch.equal(plain.following, padded.following)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-44, 1e-30, 1e-6, 0.3, 1.0]), min_size=2, max_size=7).filter(any),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_sample_never_draws_a_token_of_probability_zero(weights: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    probs = torch.tensor(weights)
    probs = probs / probs.sum()
    assert (probs[sample(probs.expand(499, -1))] > 0).all()


@given(data=st.data(), n=st.integers(0, 5), rows=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_greedy_acceptance_is_the_longest_common_prefix(data: st.DataObject, n: int, rows: int) -> None:
    def token_rows(width: int) -> list[list[int]]:
        row = st.lists(st.integers(0, 1), min_size=width, max_size=width)
        return data.draw(st.lists(row, min_size=rows, max_size=rows))

    drafted, best = token_rows(n), token_rows(n + 1)
    lengths = data.draw(st.lists(st.integers(0, n), min_size=rows, max_size=rows))
    scores = torch.nn.functional.one_hot(torch.tensor(best), V).float()
    draft = Draft(torch.tensor(drafted, dtype=torch.long).reshape(rows, n), torch.tensor(lengths), None)
    acceptance = accept(draft, scores, sampling=False)
    for row in range(rows):
        prefix = 0
        while prefix < lengths[row] and drafted[row][prefix] == best[row][prefix]:
            prefix += 1
        assert acceptance.accepted[row] == prefix
        assert acceptance.following[row] == best[row][prefix]


# --- End to end: sampled decoding of a tiny model against every text it could have written ---

LOOKUP = PromptLookup(gamma=3, min_ngram=1, max_ngram=2)


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=V, num_hidden_layers=3, seed=4)


@pytest.mark.parametrize(
    ("setting", "way"),
    [(setting, {}) for setting in OPTIONS]
    + [(setting, {"exit_threshold": 0.5}) for setting in ("plain", "top_p", "stop token")]
    + [
        (setting, {"gamma": gamma, "prompt_lookup": LOOKUP})
        for gamma in (0, 2)
        for setting in ("plain", "all together", "stop token")
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "layers",
)
def test_sampled_texts_of_a_tiny_model_follow_its_own_distribution(
    small: PreTrainedModel, setting: str, way: dict[str, Any]
) -> None:
    torch.manual_seed(23)
    spec = wrap(small, Plan(**{"skip_set": SkipSet(attn={0}, mlp={2}), "gamma": 3, **way}))
    first_rounds = assert_sampled_texts_follow(spec, OPTIONS[setting])
    assert {accepted for _, accepted in first_rounds} == {0, 1, 2, 3}, "rows must accept different numbers of tokens"
    lengths = {drafted for drafted, _ in first_rounds}
    assert (len(lengths) > 1) == bool(way), "thresholds and lookup in one of two rows make drafts ragged"
