"""A head that masks the padding of its vocabulary with minus infinity is served, with every kind of draft head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captured import assert_captured, taped
from quantised_models import TOKENS, damped_model, drafting, few_prompts
from torch import nn
from transformers import PreTrainedModel

from selfspec import Plan, SkipSet, SubVocabulary, UnsupportedModelError, wrap
from selfspec.models.probe import probe
from selfspec.models.quantised_linear import device_unsupported_reason
from selfspec.models.views import target_view
from selfspec.plan.draft_spec import INT4, INT8
from selfspec.plan.lookup import PromptLookup

GREEDY = {"do_sample": False, "max_new_tokens": 23}
MASKED = range(180, TOKENS)
EVEN = SubVocabulary.of((token for token in range(TOKENS) if token % 13 not in (5, 9)), TOKENS)
LOOKUP = PromptLookup(gamma=4, min_ngram=1, max_ngram=3)


@pytest.fixture(scope="module", params=["phi", "llama"])
def masked(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model whose head has a bias, which is minus infinity on `MASKED`; the head of phi has a bias of its own."""
    model = damped_model(request.param)
    own = model.lm_head
    if own.bias is None:
        model.lm_head = nn.Linear(own.in_features, own.out_features)
        model.lm_head.weight = own.weight
        nn.init.zeros_(model.lm_head.bias)
    with torch.no_grad():
        model.lm_head.bias[list(MASKED)] = -torch.inf
    return model


PLANS = {
    "layers": Plan(skip_set=drafting().skip_set, gamma=3),
    "cascade": Plan(skip_set=drafting().skip_set, gamma=3, prompt_lookup=LOOKUP),
    "exit threshold": Plan(skip_set=drafting().skip_set, gamma=3, exit_threshold=0.1),
    **{
        f"{format} {name}": drafting(format, **options)
        for format in (INT4, INT8)
        for name, options in {
            "head": {},
            "trimmed head": {"trimmed": True},
            "model, trimmed head": {"head": False, "trimmed": True},
        }.items()
    },
}


@pytest.mark.parametrize("name", PLANS)
def test_output_of_a_masked_vocabulary_is_model_generates(name: str, masked: PreTrainedModel) -> None:
    plan = PLANS[name]
    if plan.quantised and (reason := device_unsupported_reason(plan.quantised.format, masked.device)) is not None:
        pytest.skip(reason)
    given, spec = few_prompts(13, 7, 10), wrap(masked, plan)
    expected = masked.generate(**given, **GREEDY)
    assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert spec.stats.accepted
    sampled = spec.generate(**given, do_sample=True, max_new_tokens=23)[:, 13:]
    assert not torch.isin(sampled, torch.tensor(MASKED)).any()


def test_a_draft_model_and_captured_rounds_serve_a_masked_vocabulary(masked: PreTrainedModel) -> None:
    given, plan = few_prompts(13, 7, 10), Plan(skip_set=SkipSet(), gamma=3)
    expected = masked.generate(**given, **GREEDY)
    assert torch.equal(wrap(masked, plan, draft_model=copy.deepcopy(masked)).generate(**given, **GREEDY), expected)
    spec = taped(masked, PLANS["cascade"])
    for _ in range(2):
        assert torch.equal(spec.generate(**given, **GREEDY), expected)
    assert_captured(spec)


def test_a_view_that_masks_other_tokens_is_refused(masked: PreTrainedModel) -> None:
    view: Any = target_view(masked)
    view.lm_head = copy.deepcopy(masked.lm_head)
    with torch.no_grad():
        view.lm_head.bias[MASKED[0] - 1] = -torch.inf
    with pytest.raises(UnsupportedModelError, match=r"cannot be reproduced: the largest logit difference .* is inf"):
        probe(masked, view)
