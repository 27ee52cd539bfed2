"""The object around a model: as the model's own `generate`, copied, pickled, and around a wrapper of the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import prompts
from pairs import assert_same, llama, speculator
from torch import nn
from transformers import PreTrainedModel

from selfspec import SelfspecError, SelfSpeculator, UnsupportedModelError, wrap

TOKENS, MASK = prompts(5, 9, 2)
GIVEN: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 9}


def own() -> SelfSpeculator:
    """Around a copy of the shared model."""
    return wrap(copy.deepcopy(llama()), speculator().plan, policy="fixed")


# --- model.generate = spec.generate ---


def test_it_may_take_the_place_of_the_models_own_generate() -> None:
    spec, expected = own(), llama().generate(**GIVEN)
    spec.model.generate = spec.generate
    assert torch.equal(spec.model.generate(**GIVEN), expected)
    assert spec.stats.drafted
    streamed = list(spec.stream(TOKENS[1:2], max_new_tokens=9))
    assert streamed == expected[1, TOKENS.shape[1] :].tolist()
    spec.model.to(torch.float64)  # the views are built again, of a model that refers to the speculator
    assert torch.equal(spec.model.generate(**GIVEN), expected)
    another = wrap(spec.model, speculator().plan)
    assert_same(**GIVEN, spec=another)


# --- Copies ---


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))], ids=["copy", "pickle"]
)
def test_a_copy_decodes_with_a_model_and_a_cache_of_its_own(copied: Any) -> None:
    spec = wrap(copy.deepcopy(llama()), speculator().plan, policy="fixed", backend="sdpa", draft_model=None)
    expected = spec.generate(**GIVEN)
    other = copied(spec)
    assert (other.plan, other.options) == (spec.plan, spec.options)
    assert other.model is not spec.model
    for parameter in spec.model.parameters():
        parameter.data.zero_()
    assert torch.equal(other.generate(**GIVEN), expected)


def test_a_copy_keeps_the_draft_model() -> None:
    plan = speculator().plan
    spec = wrap(llama(), type(plan)(skip_set=type(plan.skip_set)(), gamma=3), draft_model=llama())
    other = copy.deepcopy(spec)
    assert torch.equal(other.generate(**GIVEN), llama().generate(**GIVEN))
    assert other.stats.acceptance_rate == 1.0


def test_a_copy_is_refused_while_the_model_refers_to_the_speculator() -> None:
    spec = own()
    spec.model.generate = spec.generate
    for copied in (spec, spec.model):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(SelfspecError, match="neither can be copied"):
                way(copied)
    del spec.model.generate
    assert torch.equal(copy.deepcopy(spec).generate(**GIVEN), llama().generate(**GIVEN))


# --- Wrappers ---


class Peft(nn.Module):
    """Like peft's model, which is not a dependency of the tests."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


class PeftWithMethod(Peft):
    def get_base_model(self) -> Any:
        return self.base_model.model


class LearnedPrompt(PeftWithMethod):
    class active_peft_config:
        is_prompt_learning = True


@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        (PeftWithMethod, "but PeftWithMethod was given; pass model.get_base_model(), which is a LlamaForCausalLM"),
        (Peft, "but Peft was given; pass model.base_model.model, which is a LlamaForCausalLM"),
        (LearnedPrompt, "but LearnedPrompt was given; its learned prompt is no part of the model"),
        (torch.compile, "but OptimizedModule was given; pass model._orig_mod, which is a LlamaForCausalLM"),
        (nn.DataParallel, "but DataParallel was given; pass model.module, which is a LlamaForCausalLM"),
        (lambda model: model.state_dict(), "but OrderedDict was given"),
    ],
)
def test_a_wrapper_of_a_model_is_refused_with_the_way_to_the_model(wrapper: Any, advice: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        wrap(wrapper(llama()), speculator().plan)
    assert advice in str(refusal.value)
