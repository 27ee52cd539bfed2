from __future__ import annotations

import pytest
import torch
from models import FIRST_DROPPED, damped_model, tiny_model
from torch import Tensor, tensor
from transformers import PreTrainedModel

from selfspec.benchmark.lossless import Difference, Verdict, _logits, compare, count_differing, first_difference
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


def test_the_first_difference_can_be_the_end_of_the_shorter_row() -> None:
    for got, first, count in (([1, 2, 3], None, 0), ([1, 5, 4], 1, 2), ([1, 2], 2, 1), ([1, 5], 1, 2)):
        expected, row = tensor([1, 2, 3]), tensor(got)
        assert (first_difference(expected, row), count_differing(expected, row)) == (first, count)


def test_equal_rows_have_no_difference(llama: PreTrainedModel) -> None:
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
def test_in_bfloat16_a_clear_choice_is_an_error_with_the_targets_gap() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    expected = greedy(model)
    with torch.inference_mode():
        logits = model(torch.cat([PROMPT, expected[:-1]])[None]).logits[0, len(PROMPT) - 1 :].float()
    top = logits.topk(2).values  # t 2
    position = int((top[:, 0] - top[:, 1]).argmax())  # the clearest choice, since the text depends on the processor
    got = expected.clone()
    got[position] = (got[position] + 1) % model.config.vocab_size
    (difference,) = compare(Runtime(model), [(PROMPT, expected, got)], gamma=GAMMA).differences
    assert difference.gap == pytest.approx((top[position, 0] - top[position, 1]).item(), abs=0.1)
    assert difference.rounding is not None
    assert difference.gap > 2 * difference.rounding
    assert not difference.is_near_tie


@pytest.mark.rounding
def test_in_bfloat16_a_tie_between_two_tokens_is_a_near_tie() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    expected = greedy(model)
    written = expected.tolist()
    # The token is new at its position and the text lacks the twin, so the text before the position stays the same.
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


def test_near_ties_are_within_twice_the_rounding() -> None:
    for gap, is_near_tie in ((0.5, True), (0.51, False)):
        difference = Difference(position=0, expected=1, got=2, gap=gap, rounding=0.25)
        assert difference.is_near_tie is is_near_tie


@pytest.mark.parametrize(("gap", "is_near_tie"), [(0.5, True), (0.75, False)])
def test_passes_that_agree_at_the_difference_by_luck_do_not_hide_the_rounding_before_it(
    monkeypatch: pytest.MonkeyPatch, gap: float, is_near_tie: bool
) -> None:
    one_by_one, by_rounds = torch.zeros(2, 5, 7)  # each n v
    one_by_one[1, 3] = 0.25  # the largest rounding, on a token that no pass would choose
    one_by_one[1, 6], by_rounds[1, 6] = 3.0, 3.0
    one_by_one[-1, 2] = by_rounds[-1, 2] = gap  # the passes agree here
    passes = {1: one_by_one, GAMMA + 1: by_rounds}
    monkeypatch.setattr("selfspec.benchmark.lossless._logits", lambda runtime, text, start, t, **_: passes[t])
    expected = tensor([6, 5, 4, 3, 2])
    runtime = Runtime(tiny_model("llama", dtype=torch.bfloat16))
    (difference,) = compare(runtime, [(PROMPT, expected, tensor([6, 5, 4, 3, 1]))], gamma=GAMMA).differences
    assert (difference.position, difference.gap, difference.rounding) == (4, gap, 0.25)
    assert difference.is_near_tie is is_near_tie


@pytest.mark.parametrize("most", [256, 3])
@pytest.mark.parametrize("t", [1, 5])
def test_passes_of_every_length_give_the_logits_of_the_last_new_tokens(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, t: int, most: int
) -> None:
    monkeypatch.setattr("selfspec.benchmark.lossless.MOST_POSITIONS", most)
    text = torch.cat([PROMPT, greedy(llama)])
    with torch.inference_mode():
        expected = llama(text[None]).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(_logits(Runtime(llama), text, len(PROMPT), t), expected[-most:], atol=1e-4, rtol=0.0)


def test_a_prompt_of_one_token_can_be_judged() -> None:
    model = damped_model("llama", FIRST_DROPPED, dtype=torch.bfloat16)
    (difference,) = compare(Runtime(model), [(tensor([5]), tensor([7, 8]), tensor([7, 9]))], gamma=2).differences
    assert difference.gap is not None
