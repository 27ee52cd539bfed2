from __future__ import annotations

import pytest
import torch
from models import FIRST_DROPPED, damped_model, tiny_model
from torch import Tensor, tensor
from transformers import PreTrainedModel

from selfspec.benchmark.lossless import Difference, Verdict, compare, count_differing, first_difference
from selfspec.runtime.runtime import Runtime

PROMPT = torch.arange(3, 14)
GAMMA = 4


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def greedy(model: PreTrainedModel, new_tokens: int = 13) -> Tensor:
    row = PROMPT[None]
    tokens = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new_tokens, do_sample=False)
    return tokens[0, len(PROMPT) :]


def test_the_first_difference_may_be_the_end_of_the_shorter_row() -> None:
    assert first_difference(tensor([1, 2, 3]), tensor([1, 2, 3])) is None
    assert first_difference(tensor([1, 2, 3]), tensor([1, 5, 4])) == 1
    assert first_difference(tensor([1, 2, 3]), tensor([1, 2])) == 2
    assert count_differing(tensor([1, 2, 3]), tensor([1, 5])) == 2


def test_equal_rows_have_nothing_to_explain(llama: PreTrainedModel) -> None:
    expected = greedy(llama)
    verdict = compare(Runtime(llama), [(PROMPT, expected, expected.clone())], gamma=GAMMA)
    assert verdict == Verdict(rows=1, tokens=13, differing_tokens=0, differences=())
    assert str(verdict) == "0"


def test_in_float32_every_difference_is_an_error(llama: PreTrainedModel) -> None:
    expected = greedy(llama)
    got = expected.clone()
    got[5] += 1
    verdict = compare(Runtime(llama), [(PROMPT, expected, got), (PROMPT, expected, expected)], gamma=GAMMA)
    assert (verdict.rows, verdict.tokens, verdict.differing_tokens) == (2, 26, 1)
    assert (verdict.errors, verdict.near_ties) == (1, 0)
    assert verdict.differences[0].position == 5
    assert "float32 must be equal" in str(verdict.differences[0])


def test_a_row_that_ends_early_differs_where_it_ends(llama: PreTrainedModel) -> None:
    expected = greedy(llama)
    (difference,) = compare(Runtime(llama), [(PROMPT, expected, expected[:7])], gamma=GAMMA).differences
    assert (difference.position, difference.expected, difference.got) == (7, int(expected[7]), None)


@pytest.mark.rounding
def test_in_bfloat16_a_clear_choice_is_an_error_and_the_gap_is_the_targets_own() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    expected = greedy(model)
    with torch.inference_mode():
        logits = model(torch.cat([PROMPT, expected[:-1]])[None]).logits[0, len(PROMPT) - 1 :].float()
    top = logits.topk(2).values  # t 2
    position = int((top[:, 0] - top[:, 1]).argmax())  # the clearest: what the model writes is up to the processor
    got = expected.clone()
    got[position] = (got[position] + 1) % model.config.vocab_size
    (difference,) = compare(Runtime(model), [(PROMPT, expected, got)], gamma=GAMMA).differences
    assert difference.gap == pytest.approx((top[position, 0] - top[position, 1]).item(), abs=0.1)
    assert difference.rounding is not None
    assert difference.gap is not None
    assert difference.gap > 2 * difference.rounding
    assert not difference.is_near_tie


@pytest.mark.rounding
def test_in_bfloat16_a_tie_between_two_tokens_is_a_near_tie() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    expected = greedy(model)
    written = expected.tolist()
    # A token that is new at its position, and a twin that is nowhere: nothing changes before, whatever the text is.
    position = max(place for place, token in enumerate(written) if token not in written[:place])
    twin = max(set(range(model.config.vocab_size)) - set(written))
    with torch.no_grad():  # make the twin's logit equal to the token's own
        model.lm_head.weight[twin] = model.lm_head.weight[int(expected[position])]
    again = greedy(model)
    assert torch.equal(again[:position], expected[:position])
    got = again.clone()
    got[position] = twin if int(again[position]) != twin else int(expected[position])
    (difference,) = compare(Runtime(model), [(PROMPT, again, got)], gamma=GAMMA).differences
    assert difference.gap == 0
    assert difference.is_near_tie


def test_near_ties_are_within_twice_the_rounding_and_not_beyond() -> None:
    def at(gap: float) -> Difference:
        return Difference(position=0, expected=1, got=2, gap=gap, rounding=0.25)

    assert at(0.5).is_near_tie
    assert not at(0.51).is_near_tie


def test_the_rule_serves_prompts_of_one_token() -> None:
    model = damped_model("llama", FIRST_DROPPED, dtype=torch.bfloat16)
    (difference,) = compare(Runtime(model), [(tensor([5]), tensor([7, 8]), tensor([7, 9]))], gamma=2).differences
    assert difference.gap is not None
