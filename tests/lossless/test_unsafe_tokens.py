"""A NaN or an infinity in the embedding of a token that is drafted and rejected never reaches another position."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from captured import CASCADE, GAMMA, GREEDY, PLAN, assert_captured, batch, taped
from laws import V, assert_follows
from models import FIRST_DROPPED, damp, damped_model, tiny_model
from tape import TapeRecorder
from torch import Tensor, nn
from transformers import PreTrainedModel

import selfspec.decoding.round
from selfspec import DecodeOptions, Plan, SelfSpeculator, SkipSet, wrap
from selfspec.decoding.acceptance import Acceptance, Draft, accept
from selfspec.models.unsafe_tokens import unsafe_tokens

LENGTHS = (11, 11, 11)
DRAFT_MODEL = Plan(skip_set=SkipSet(), gamma=GAMMA)
UNSAFE = 3


def spoil(model: PreTrainedModel, tokens: list[int], value: float = torch.nan) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens, 5] = value


def speculator(model: PreTrainedModel, plan: Plan, *, captured: bool) -> SelfSpeculator:
    if plan is not DRAFT_MODEL:
        return taped(model, plan) if captured else wrap(model, plan)
    draft_model = copy.deepcopy(model)
    damp(draft_model, FIRST_DROPPED, 0.0)
    return SelfSpeculator(model, plan, DecodeOptions(), draft_model, recorder=TapeRecorder() if captured else None)


def rejected_tokens(spec: SelfSpeculator, given: dict[str, Tensor]) -> list[int]:
    """Tokens that `spec` drafts and the target does not write, and token 0, which pads drafts."""
    drafted: set[int] = {0}

    def watched(draft: Draft, scores: Tensor, *, sampling: bool) -> Acceptance:
        drafted.update(draft.tokens.flatten().tolist())
        return accept(draft, scores, sampling=sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfspec.decoding.round, "accept", watched)
        written = spec.generate(**given, **GREEDY)
    return sorted(drafted - set(written.flatten().tolist()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("captured", [False, True], ids=["uncaptured", "captured"])
@pytest.mark.parametrize("plan", [PLAN, CASCADE, DRAFT_MODEL], ids=["layers", "cascade", "draft model"])
def test_rejected_tokens_without_a_finite_embedding_change_no_text(plan: Plan, captured: bool, value: float) -> None:
    model, given = damped_model("llama", FIRST_DROPPED), batch(*LENGTHS)
    unsafe = rejected_tokens(speculator(model, plan, captured=False), given)
    assert len(unsafe) > 3, "choose another prompt"
    spoil(model, unsafe, value)
    spec = speculator(model, plan, captured=captured)
    for _ in range(3):
        assert torch.equal(spec.generate(**given, **GREEDY), model.generate(**given, **GREEDY))
        assert spec.stats.accepted
    if captured:
        assert_captured(spec)


def test_a_row_that_ends_with_an_unsafe_token_leaves_no_trace() -> None:
    model, given = damped_model("llama", FIRST_DROPPED), batch(*LENGTHS)
    written = model.generate(**given, **GREEDY)[:, LENGTHS[0] :].tolist()
    stop = next(t for t in written[0][4:] if t not in written[1] + written[2] + given["input_ids"].flatten().tolist())
    spoil(model, [stop])
    spec = wrap(model, PLAN)
    options = GREEDY | {"eos_token_id": stop, "pad_token_id": 0}
    for _ in range(2):  # the second request writes over the slots of the first
        assert torch.equal(spec.generate(**given, **options), model.generate(**given, **options))
    assert written[0].index(stop) < 10, "the first row ends early, and goes on with rounds"
    shorter = batch(3, 11, 11, seed=1)  # the first row now begins before the slots that it left behind
    healthy = damped_model("llama", FIRST_DROPPED).generate(**shorter, **GREEDY)
    assert stop not in healthy, "choose another prompt"
    assert torch.equal(spec.generate(**shorter, **options), healthy)


def test_a_draft_ends_before_its_first_unsafe_token() -> None:
    model = tiny_model("llama", vocab_size=7, num_hidden_layers=1)
    spoil(model, [0, 3])
    unsafe = unsafe_tokens(model)
    assert unsafe is not None
    draft = Draft(torch.tensor([[1, 3, 2], [5, 6, 0], [3, 1, 1]]), torch.tensor([3, 2, 3]), None).safe(unsafe)
    assert draft.tokens.tolist() == [[1, 1, 2], [5, 6, 1], [1, 1, 1]]
    assert draft.lengths.tolist() == [1, 2, 0]
    inf = float("-inf")
    scores = torch.tensor([[3.0, 1, inf, 2, inf, inf, inf], [3.0, inf, inf, 2, inf, inf, inf]])
    assert unsafe.excluded(scores).tolist() == [[inf, 1, inf, inf, inf, inf, inf], scores[1].tolist()]


def test_models_with_finite_embeddings_have_no_unsafe_tokens() -> None:
    assert unsafe_tokens(tiny_model("llama", num_hidden_layers=1)) is None
    assert wrap(tiny_model("llama"), PLAN).runtime.unsafe_tokens is None


def raise_unsafe(model: PreTrainedModel, bias: float) -> None:
    """Give the model a head with a bias, which is 0 for all tokens but the unsafe token."""
    head = nn.Linear(model.config.hidden_size, V)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(torch.where(torch.arange(V) == UNSAFE, bias, 0.0))
    model.lm_head = head


def test_sampled_texts_follow_the_target_where_the_draft_would_propose_unsafe_tokens() -> None:
    """A chi-square test as in `laws`: false alarm 1e-6."""
    torch.manual_seed(5)
    healthy = tiny_model("llama", vocab_size=V, num_hidden_layers=3, seed=4)
    draft_model = copy.deepcopy(healthy)
    damp(draft_model, SkipSet(attn={1}, mlp={1}), 0.0)
    raise_unsafe(healthy, -torch.inf)  # the target never writes the unsafe token, which the draft model likes best
    raise_unsafe(draft_model, 3.0)
    model = copy.deepcopy(healthy)
    spoil(model, [UNSAFE])
    spec, rows, length, prompt = wrap(model, DRAFT_MODEL, draft_model=draft_model), 2999, 2, torch.tensor([[1, 4, 2]])
    texts = spec.generate(prompt, do_sample=True, top_k=0, max_new_tokens=length, num_return_sequences=rows)[:, 3:]
    assert 0.1 < spec.stats.acceptance_rate < 0.95
    continuations = torch.tensor(list(product(range(V), repeat=length)))
    with torch.no_grad():
        logits = healthy(torch.cat([prompt.expand(len(continuations), -1), continuations], dim=1)).logits[:, 2:-1]
    p = torch.softmax(logits, dim=-1).gather(2, continuations[..., None]).prod(dim=1)[:, 0]
    proposed = torch.softmax(draft_model(prompt).logits[0, -1], dim=-1)[UNSAFE]
    assert proposed > 0.4, "the draft model would propose the unsafe token"
    counts = torch.bincount(texts[:, 0] * V + texts[:, 1], minlength=V**length)
    assert_follows(counts[None], p[None])
