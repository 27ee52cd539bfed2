"""Acceptance, by chi-square: what a round commits follows p, whatever q was.

Every statistical test here fixes its seed. Were the seed drawn anew, each would raise a false alarm with probability
1e-6.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from scipy.stats import chi2
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import selfspec
from selfspec import Plan, SkipSet
from selfspec.decoding.acceptance import Acceptance, Draft, accept
from selfspec.decoding.logits_processors import process
from selfspec.decoding.sampling import pick, sample
from selfspec.plan import PromptLookup

FALSE_ALARM = 1e-6
V = 5  # vocabulary of the toy rounds
N = 3  # drafted a round
ROUNDS = 30_011

PROCESSORS: dict[str, LogitsProcessor] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor(1.7),
    "temperature": TemperatureLogitsWarper(0.7),
    "top_k": TopKLogitsWarper(4),
    "top_p": TopPLogitsWarper(0.9),
    "min_p": MinPLogitsWarper(0.15),
}
CHAINS: dict[str, list[LogitsProcessor]] = {
    "plain": [],
    **{name: [processor] for name, processor in PROCESSORS.items()},
    "all together": list(PROCESSORS.values()),
}


# --- Chi-square ---


def assert_follows(counts: Tensor, probabilities: Tensor) -> None:
    """Each row of counts (`g v`) is drawn from its row of probabilities, and nothing impossible was drawn.

    One chi-square test over all rows. Cells that expect fewer than five are pooled within their row.
    """
    assert counts.sum() > 500, "too few draws to tell anything"
    assert not counts[probabilities == 0].any(), "an impossible token was drawn"
    statistic, freedom = 0.0, 0
    for observed, p in zip(counts.double().numpy(), probabilities.double().numpy(), strict=True):
        expected = p * observed.sum()
        common = expected >= 5
        observed = np.append(observed[common], observed[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
        if expected[-1] < 5:  # a rare remainder tells little and distorts the statistic
            observed, expected = observed[:-1], expected[:-1]
        if len(expected) > 1:
            statistic += ((observed - expected) ** 2 / expected).sum()
            freedom += len(expected) - 1
    assert freedom > 0, "every row has one likely token: nothing is tested"
    alarm = chi2.sf(statistic, freedom)
    assert alarm > FALSE_ALARM, f"chi-square {statistic:.1f} at {freedom} degrees of freedom: probability {alarm:.1e}"


def test_the_chi_square_test_itself_tells_close_distributions_apart() -> None:
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
    target: Tensor  # v v, the target's logits behind each token
    drafter: Tensor  # v v
    processors: list[LogitsProcessor]

    def distribution(self, logits: Tensor, prefix: tuple[int, ...]) -> Tensor:
        """p or q behind the prompt (token 0) and `prefix`, by Hugging Face's own list of processors."""
        context = torch.tensor([[0, *prefix]])
        scores = LogitsProcessorList(self.processors)(context, logits[context[:, -1]])
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
        """What was committed at `position`, by those rounds that got there: accepted, recovered or bonus."""
        counts, expected = [], []
        drafted = torch.nn.functional.pad(self.draft.tokens, (0, 1))[:, position]
        for rows, p, _ in self.by_prefix(position):
            tokens = torch.where(self.acceptance.accepted > position, drafted, self.acceptance.following)
            counts.append(torch.bincount(tokens[rows], minlength=V))
            expected.append(p)
        assert_follows(torch.stack(counts), torch.stack(expected))

    def assert_accepted_follow_the_overlap(self, position: int) -> None:
        counts, expected = [], []
        for rows, p, q in self.by_prefix(position):
            rows = rows & (self.acceptance.accepted > position)
            counts.append(torch.bincount(self.draft.tokens[rows, position], minlength=V))
            expected.append(torch.minimum(p, q) / torch.minimum(p, q).sum())
        assert_follows(torch.stack(counts), torch.stack(expected))

    def assert_recovered_follow_the_residual(self, position: int) -> None:
        counts, expected = [], []
        for rows, p, q in self.by_prefix(position):
            rows = rows & (self.acceptance.accepted == position) & (self.draft.lengths > position)
            residual = (p - q).clamp(min=0)
            counts.append(torch.bincount(self.acceptance.following[rows], minlength=V))
            expected.append(residual / residual.sum())
        assert_follows(torch.stack(counts), torch.stack(expected))


def play(processors: list[LogitsProcessor], lengths: Tensor | None = None, seed: int = 3) -> Rounds:
    """Draft and accept as the runtime does: every processor on both p and q, each behind its own tokens."""
    torch.manual_seed(seed)
    target = torch.randn(V, V)
    drafter = target + 0.6 * torch.randn(V, V)
    sequences = torch.zeros(ROUNDS, 1 + N, dtype=torch.long)
    chain, probs = LogitsProcessorList(processors), []
    ends = torch.ones(ROUNDS, 1, dtype=torch.long)
    for step in range(N):
        logits = drafter[sequences[:, step]][:, None]
        scores = process(chain, logits, sequences, ends + step)[:, 0]
        picked = pick(scores, sampling=True)
        sequences[:, step + 1], q = picked.token, picked.probs
        assert q is not None
        probs.append(q)
    lengths = torch.full((ROUNDS,), N) if lengths is None else lengths
    draft = Draft(sequences[:, 1:], lengths, torch.stack(probs, dim=1))
    scores = process(chain, target[sequences], sequences, ends + torch.arange(N + 1))
    return Rounds(draft, accept(draft, scores, sampling=True), target, drafter, processors)


@pytest.fixture(scope="module", params=CHAINS)
def rounds(request: pytest.FixtureRequest) -> Rounds:
    return play(CHAINS[request.param])


@pytest.mark.parametrize("position", range(N))
def test_accepted_and_recovered_tokens_together_follow_p_at_every_position(rounds: Rounds, position: int) -> None:
    rounds.assert_tokens_follow_p(position)


def test_the_bonus_token_follows_p(rounds: Rounds) -> None:
    rounds.assert_tokens_follow_p(N)


def test_accepted_tokens_alone_follow_the_overlap_of_p_and_q(rounds: Rounds) -> None:
    for position in range(2):
        rounds.assert_accepted_follow_the_overlap(position)


def test_recovered_tokens_alone_follow_what_p_has_beyond_q(rounds: Rounds) -> None:
    for position in range(2):
        rounds.assert_recovered_follow_the_residual(position)


def test_a_row_with_a_shorter_draft_gets_its_bonus_token_at_its_own_length() -> None:
    lengths = torch.arange(ROUNDS) % (N + 1)
    rounds = play([], lengths)
    assert (rounds.acceptance.accepted <= lengths).all()
    for position in range(N + 1):
        rounds.assert_tokens_follow_p(position)
    for length in range(N + 1):  # and rows of each length by themselves: no bias by length
        own = Rounds(**vars(rounds))
        rows = lengths == length
        own.draft = Draft(rounds.draft.tokens[rows], lengths[rows], None)
        own.acceptance = Acceptance(rounds.acceptance.accepted[rows], rounds.acceptance.following[rows])
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
def test_a_one_hot_draft_is_accepted_as_often_as_p_has_it(given: str) -> None:
    torch.manual_seed(11)
    q = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    acceptance = one_step(P, q if given == "as probabilities" else None, torch.full((ROUNDS,), 1))
    passed = acceptance.accepted == 1
    assert_follows(torch.stack([passed.sum(), (~passed).sum()])[None], torch.tensor([[0.29, 0.71]]))
    without = torch.where(q > 0, 0.0, P)
    assert_follows(counted(acceptance.following[~passed]), without[None] / without.sum())
    assert_follows(counted(acceptance.following[passed]), P[None])


def test_where_rounding_leaves_no_residual_mass_p_itself_is_drawn_from() -> None:
    torch.manual_seed(13)
    q = P * 1.5  # rounding at its worst: q exceeds p everywhere, so tokens fail although nothing is left to recover
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
def test_padding_a_draft_changes_nothing_about_its_rows(sampling: bool) -> None:
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

LENGTH = 4
ROWS = 499
CALLS = 2
EOS = 3

LOOKUP = PromptLookup(gamma=3, min_ngram=1, max_ngram=2)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "all together": {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
    "stop token": {"eos_token_id": EOS},
}


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=V, num_hidden_layers=3, seed=4)


@torch.no_grad()
def law(model: PreTrainedModel, prompt: Tensor, options: dict[str, Any]) -> Tensor:
    """The probability of each of the `V ** LENGTH` texts behind a prompt, through the plain model, token by token."""
    texts = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)
    tokens = torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
    logits = model(input_ids=tokens).logits.float()
    chosen = {name: value for name, value in options.items() if name in PROCESSORS}
    config = model.generation_config.from_dict({"do_sample": True, "top_k": 0, **chosen})
    chain = model._get_logits_processor(config, input_ids_seq_length=prompt.shape[1])
    probability = torch.ones(len(texts), dtype=torch.double)
    stopped = torch.zeros(len(texts), dtype=torch.bool)
    for step in range(LENGTH):
        end = prompt.shape[1] + step
        p = torch.softmax(chain(tokens[:, :end], logits[:, end - 1]), dim=-1).gather(1, tokens[:, end : end + 1])[:, 0]
        # Behind a stop token there is padding, token 0, and nothing else.
        probability *= torch.where(stopped, (tokens[:, end] == 0).double(), p.double())
        stopped |= tokens[:, end] == options.get("eos_token_id", -1)
    return probability


@pytest.mark.parametrize(
    ("setting", "way"),
    [(setting, {}) for setting in OPTIONS]
    + [(setting, {"exit_threshold": 0.5}) for setting in ("plain", "top_p", "stop token")]
    + [(setting, {"gamma": 0, "prompt_lookup": LOOKUP}) for setting in ("plain", "all together", "stop token")]
    + [(setting, {"gamma": 2, "prompt_lookup": LOOKUP}) for setting in ("plain", "all together", "stop token")],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "layers",
)
def test_sampled_texts_of_a_tiny_model_follow_its_own_distribution(
    small: PreTrainedModel, setting: str, way: dict[str, Any]
) -> None:
    torch.manual_seed(23)
    prompts = torch.tensor([[0, 4, 1, 2], [1, 4, 2, 4]])  # the first is padded; the second repeats a token
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    spec = selfspec.wrap(small, Plan(**{"skip_set": SkipSet(attn={0}, mlp={2}), "gamma": 3, **way}))
    options = {"top_k": 0, **OPTIONS[setting]}
    counts = torch.zeros(2, V**LENGTH, dtype=torch.long)
    powers = torch.tensor([V**i for i in reversed(range(LENGTH))])
    ragged = set()
    for _ in range(CALLS):
        texts = spec.generate(
            prompts,
            attention_mask=mask,
            do_sample=True,
            max_new_tokens=LENGTH,
            num_return_sequences=ROWS,
            pad_token_id=0,
            **options,
        )[:, 4:]
        texts = torch.nn.functional.pad(texts, (0, LENGTH - texts.shape[1]))
        for index, rows in enumerate(texts.split(ROWS)):
            counts[index] += torch.bincount((rows * powers).sum(dim=1), minlength=V**LENGTH)
        ragged |= {(drafted, accepted) for _, drafted, accepted in spec.stats.history[0]}
    assert {accepted for _, accepted in ragged} == {0, 1, 2, 3}, "rows were to accept different numbers of tokens"
    lengths = {drafted for drafted, _ in ragged}
    assert (len(lengths) > 1) == bool(way), "thresholds make drafts ragged, and so does lookup in one of two rows"
    expected = torch.stack([law(small, prompts[:1, 1:], options), law(small, prompts[1:], options)])
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(2, dtype=torch.double))
    assert_follows(counts, expected)
