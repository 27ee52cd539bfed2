"""Supported options of `generate` give the greedy tokens of `model.generate`; all other options are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from models import CACHE, ENDS_SKIPPED, PAD, VOCABULARY, assert_exercised, damped_model, prompts
from pairs import assert_same, llama, speculator, text, tokenizer
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    WatermarkingConfig,
)
from transformers.generation import EosTokenCriteria

from selfspec import InputError, Plan, SelfspecError, UnsupportedOptionError, wrap

TOKENS, MASK = prompts(5, 9, 2)
WIDTH = TOKENS.shape[1]
NEW = 23


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": NEW, **options}


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """The new tokens without options. The options below are chosen to change these tokens."""
    return llama().generate(**batch())[:, WIDTH:]


def nth_new_token(plain: Tensor, row: int, index: int) -> int:
    """The row's token at this index, which the row does not have before."""
    token = int(plain[row, index])
    assert token not in plain[row, :index], "choose another index"
    return token


# --- Plans ---


@pytest.mark.parametrize("gamma", range(8))
def test_every_gamma_gives_the_models_own_tokens(gamma: int) -> None:
    stats = assert_same(**batch(), spec=speculator(gamma))
    if gamma:
        assert stats.drafted > 0
    else:
        assert (stats.drafted, stats.tokens_per_round) == (0, 1)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.6, 0.99])
def test_every_exit_threshold_gives_the_models_own_tokens(threshold: float) -> None:
    assert_same(**batch(), spec=speculator(5, threshold))


def test_the_shared_model_accepts_and_rejects_drafts_in_text_that_does_not_loop() -> None:
    ours = speculator().generate(**batch())
    assert_exercised(speculator().stats, ours, WIDTH)


# --- Prompts ---


def test_the_prompt_by_position_by_keyword_or_as_a_tokenizers_dict() -> None:
    one = TOKENS[1:2]
    assert_same(one, max_new_tokens=NEW)
    assert_same(input_ids=one, max_new_tokens=NEW)
    assert_same(**tokenizer()(["abcXYZ", "qr"], padding=True, padding_side="left", return_tensors="pt"), max_length=20)


def test_without_a_mask_the_pad_token_marks_padding() -> None:
    stats = assert_same(TOKENS, max_new_tokens=NEW)
    assert torch.equal(speculator().generate(TOKENS, max_new_tokens=NEW), speculator().generate(**batch()))
    assert stats.rows == 3


def test_32_bit_tokens_give_the_same_result_as_64_bit_tokens() -> None:
    ours = speculator().generate(TOKENS.int(), attention_mask=MASK.bool(), max_new_tokens=NEW)
    assert torch.equal(ours, llama().generate(**batch()))


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 6, 1)])
def test_prompts_of_a_single_token(lengths: tuple[int, ...]) -> None:
    tokens, mask = prompts(*lengths, seed=3)
    assert_same(tokens, attention_mask=mask, max_new_tokens=NEW)


# --- Lengths ---


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5])
def test_a_handful_of_new_tokens(new_tokens: int) -> None:
    stats = assert_same(**batch(max_new_tokens=new_tokens), spec=speculator(4))
    assert stats.tokens == 3 * new_tokens


def test_max_new_tokens_overrides_max_length() -> None:
    assert_same(**batch(max_length=WIDTH + 3))


def test_max_length_counts_the_prompt() -> None:
    assert_same(TOKENS, attention_mask=MASK, max_length=WIDTH + 6)


def test_the_default_length_is_that_of_hugging_face() -> None:
    with pytest.warns(UserWarning, match="max_length"):
        ours = speculator().generate(TOKENS, attention_mask=MASK)
    assert ours.shape == (3, WIDTH + 20)


def test_min_new_tokens_keeps_a_row_from_stopping(plain: Tensor) -> None:
    stop = nth_new_token(plain, 0, 4)
    short = speculator().generate(**batch(eos_token_id=stop))
    assert_same(**batch(eos_token_id=stop, min_new_tokens=11))
    assert_same(**batch(eos_token_id=stop, min_length=WIDTH + 11))
    longer = speculator().generate(**batch(eos_token_id=stop, min_new_tokens=11))
    assert not torch.equal(short, longer[:, : short.shape[1]])


@pytest.mark.parametrize("limit", [WIDTH + 4, WIDTH, 1])
def test_a_users_length_criterion_replaces_the_limit(limit: int) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=limit)])
    assert_same(**batch(stopping_criteria=criteria))
    assert speculator().generate(**batch(stopping_criteria=criteria)).shape[1] == max(limit, WIDTH + 1)


# --- Stopping ---


def test_rows_that_stop_at_different_times_are_padded(plain: Tensor) -> None:
    stops = [nth_new_token(plain, 0, 3), nth_new_token(plain, 1, 12), nth_new_token(plain, 2, 8)]
    for eos in (stops[0], stops[1], stops):
        assert_same(**batch(eos_token_id=eos))
    ends = (speculator().generate(**batch(eos_token_id=stops))[:, WIDTH:] == PAD).int().argmax(dim=1)
    assert len(set(ends.tolist())) == 3


@pytest.mark.parametrize("index", range(6))
def test_a_stop_token_at_any_place_of_a_round_ends_the_row_there(plain: Tensor, index: int) -> None:
    stop = int(plain[1, index])
    stats = assert_same(**batch(eos_token_id=stop), spec=speculator(5))
    first = [row.tolist().index(stop) + 1 if stop in row else NEW for row in plain]
    assert stats.tokens == sum(first)


def test_a_row_may_finish_in_its_first_round(plain: Tensor) -> None:
    stats = assert_same(**batch(eos_token_id=int(plain[2, 0])), spec=speculator(5))
    assert stats.history[0][2][0] == 2
    assert all(row != 2 for rounds in stats.history[1:] for row, _, _ in rounds)


def test_finished_rows_are_padded_with_the_pad_token_or_else_the_stop_token(plain: Tensor) -> None:
    stop = nth_new_token(plain, 0, 3)
    assert_same(**batch(eos_token_id=stop, pad_token_id=7))
    model = copy.deepcopy(llama())
    model.generation_config.pad_token_id = None
    assert_same(**batch(eos_token_id=stop), spec=wrap(model, speculator().plan))


def test_a_stop_token_criterion_of_the_users_own(plain: Tensor) -> None:
    criteria = StoppingCriteriaList([EosTokenCriteria([nth_new_token(plain, 0, 3), nth_new_token(plain, 2, 8)])])
    stats = assert_same(**batch(stopping_criteria=criteria))
    assert not stats.slower_paths


class StopsAnywhereBut(EosTokenCriteria):
    """Answers the opposite of its base class, so a subclass must not count as its base class."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ~super().__call__(input_ids, scores, **kwargs)


def test_a_subclass_of_a_known_criterion_is_called(plain: Tensor) -> None:
    criteria = StoppingCriteriaList([StopsAnywhereBut([int(plain[0, 0])])])
    stats = assert_same(**batch(stopping_criteria=criteria))
    assert "StopsAnywhereBut" in stats.slower_paths[0]


# --- Stop strings ---


def stop_string(plain: Tensor, row: int, index: int) -> str:
    """The last character of one token of the row and the first character of the next token."""
    return text(plain[row, index : index + 1])[-1] + text(plain[row, index + 1 : index + 2])[0]


@pytest.mark.parametrize("index", range(1, 7))
def test_a_stop_string_ends_one_row_within_a_round(plain: Tensor, index: int) -> None:
    options = {"max_new_tokens": NEW, "stop_strings": stop_string(plain, 1, index), "tokenizer": tokenizer()}
    stats = assert_same(TOKENS[1:2], **options, spec=speculator(5))
    assert not stats.slower_paths
    assert stats.tokens == speculator(5).generate(TOKENS[1:2], **options).shape[1] - WIDTH


def test_stop_strings_in_a_batch_with_a_stop_token_pad_the_rows_that_ended(plain: Tensor) -> None:
    strings = [stop_string(plain, 0, 2), stop_string(plain, 1, 9)]
    stats = assert_same(**batch(stop_strings=strings, tokenizer=tokenizer(), eos_token_id=nth_new_token(plain, 2, 5)))
    assert not stats.slower_paths
    assert stats.drafted


def test_stop_strings_in_a_batch_without_a_stop_token_let_early_rows_run_on(plain: Tensor) -> None:
    strings = [stop_string(plain, 0, 2), stop_string(plain, 1, 9), stop_string(plain, 2, 5)]
    options = batch(stop_strings=strings, tokenizer=tokenizer())
    stats = assert_same(**options)
    assert PAD not in speculator().generate(**options)[:, WIDTH:]
    assert "run on until all have" in stats.slower_paths[0]


def test_stop_strings_from_the_config_given_or_the_models_own(plain: Tensor) -> None:
    strings = [stop_string(plain, 1, 4)]
    one = {"inputs": TOKENS[1:2], "tokenizer": tokenizer()}
    given = GenerationConfig(max_new_tokens=NEW, stop_strings=strings)
    assert_same(**one, generation_config=given)
    assert_same(**one, generation_config=given, stop_strings=None)
    assert given.stop_strings == strings
    model = copy.deepcopy(llama())
    model.generation_config.stop_strings = strings
    spec = wrap(model, speculator().plan)
    assert_same(**one, max_new_tokens=NEW, spec=spec)
    stats = assert_same(**one, generation_config=GenerationConfig(max_new_tokens=NEW), spec=spec)
    assert stats.tokens < NEW
    assert model.generation_config.stop_strings == strings


def test_a_users_stop_string_criterion_overrides_stop_strings(plain: Tensor) -> None:
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer(), stop_string(plain, 1, 9))])
    options = {"stopping_criteria": criteria, "stop_strings": stop_string(plain, 1, 2), "tokenizer": tokenizer()}
    assert_same(TOKENS[1:2], max_new_tokens=NEW, **options)


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(InputError, match="tokenizer="):
        speculator().generate(**batch(stop_strings="ab"))


# --- Processors, as options ---


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 2.5},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
        {"encoder_repetition_penalty": 3.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"renormalize_logits": True, "repetition_penalty": 1.7},
        {"remove_invalid_values": True, "repetition_penalty": 1.7},
        {"forced_eos_token_id": 5},
        {"forced_bos_token_id": 6},
    ],
    ids=str,
)
def test_hugging_faces_own_processors_keep_the_fast_path(plain: Tensor, option: dict[str, Any]) -> None:
    stats = assert_same(**batch(), **option, spec=speculator(4))
    assert stats.drafted
    assert not stats.slower_paths
    if "forced_bos_token_id" not in option:  # forced_bos_token_id acts only on prompts of one token
        assert not torch.equal(speculator(4).generate(**batch(), **option)[:, WIDTH:], plain), "changes nothing"


def test_processors_that_name_tokens_keep_the_fast_path(plain: Tensor) -> None:
    first, later, stop = int(plain[0, 0]), nth_new_token(plain, 1, 4), nth_new_token(plain, 2, 9)
    for option in (
        {"bad_words_ids": [[first], [int(plain[1, 3]), later]]},
        {"suppress_tokens": [first, later]},
        {"begin_suppress_tokens": [first]},
        {"sequence_bias": [[[first], -9.0], [[int(plain[1, 3]), later], -9.0]]},
        {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": stop},
    ):
        stats = assert_same(**batch(), **option)
        assert stats.drafted
        assert not stats.slower_paths
        assert not torch.equal(speculator().generate(**batch(), **option)[:, WIDTH:], plain), f"{option}: no change"


def test_a_prompt_of_one_token_can_have_its_first_token_forced() -> None:
    assert_same(TOKENS[:, -1:], max_new_tokens=5, forced_bos_token_id=6)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"watermarking_config": WatermarkingConfig(bias=6.0)}, "WatermarkLogitsProcessor"),
        ({"guidance_scale": 2.3}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda row, tokens: [row + 1, len(tokens), 9]}, "PrefixConstrained"),
    ],
    ids=["watermark", "guidance", "allowed tokens"],
)
def test_processors_that_must_see_each_context_once_decode_in_lock_step(option: dict[str, Any], name: str) -> None:
    stats = assert_same(**batch(), **option)
    assert stats.drafted == 0
    assert name in stats.slower_paths[0]


# --- Generation configs ---


def test_a_generation_config_and_its_overrides_by_keyword() -> None:
    config = GenerationConfig(max_new_tokens=NEW, repetition_penalty=2.5, eos_token_id=3)
    before = config.to_dict()
    assert_same(TOKENS, attention_mask=MASK, generation_config=config)
    assert_same(TOKENS, config, attention_mask=MASK, repetition_penalty=1.0, max_new_tokens=5)
    assert config.to_dict() == before


def test_the_models_own_generation_config_applies_and_stays_unchanged(plain: Tensor) -> None:
    model = copy.deepcopy(llama())
    model.generation_config.update(repetition_penalty=2.5, max_new_tokens=9, eos_token_id=[nth_new_token(plain, 0, 4)])
    before = model.generation_config.to_dict()
    assert_same(TOKENS, attention_mask=MASK, spec=wrap(model, speculator().plan))
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    "own", [{"cache_implementation": "hybrid"}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_our_cache_replaces_the_cache_of_the_models_own_config(own: dict[str, Any]) -> None:
    model = copy.deepcopy(llama())
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    spec = wrap(model, speculator().plan)
    expected = llama().generate(**batch())
    assert torch.equal(spec.generate(**batch()), expected)
    edited = copy.deepcopy(model.generation_config)
    assert torch.equal(spec.generate(**batch(generation_config=edited)), expected)
    assert torch.equal(model.generate(**batch(custom_generate=spec)), expected)
    with pytest.raises(UnsupportedOptionError, match="cache_implementation"):
        spec.generate(**batch(generation_config=GenerationConfig(cache_implementation="offloaded")))


def test_no_unused_cache_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(llama())
    model.generation_config.cache_implementation = "static"
    spec = wrap(model, speculator().plan)
    monkeypatch.setattr(model, "_prepare_static_cache", None)  # calling it would raise
    assert torch.equal(spec.generate(**batch()), llama().generate(**batch()))


# --- Refused ---

REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "assistant_model": llama,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "inputs_embeds": torch.zeros(3, WIDTH, 67),
    "past_key_values": DynamicCache(),
    "cache": DynamicCache(),
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "use_cache": False,
    "use_mtp": True,
    "position_ids": torch.arange(WIDTH).expand(3, -1),
    "token_healing": True,
    "synced_gpus": True,
    "custom_generate": "transformers-community/dola",
    "token_type_ids": torch.zeros_like(TOKENS),
    "no_such_option": 1,
    "num_return_sequences": 2,  # greedy rows would be equal
    "max_new_tokens": 0,
}
IN_CONFIGS = (
    *("num_beams", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "use_cache"),
    *("output_attentions", "output_hidden_states", "cache_implementation", "use_mtp", "token_healing"),
)
NAMES = {"penalty_alpha": "contrastive", "dola_layers": "dola"}
"""The names in error messages that differ from the option's name."""


def assert_refused(name: str, **options: Any) -> None:
    with pytest.raises((UnsupportedOptionError, InputError)) as refusal:
        speculator().generate(**options)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_option_is_refused_by_name(name: str) -> None:
    value = REFUSED[name]() if name == "assistant_model" else REFUSED[name]
    assert_refused(NAMES.get(name, name), **batch(**{name: value}))


@pytest.mark.parametrize("name", IN_CONFIGS)
def test_unsupported_options_of_a_generation_config_are_refused(name: str) -> None:
    further = {"top_k": 4} if name == "penalty_alpha" else {}
    config = GenerationConfig(max_new_tokens=3, **{name: REFUSED[name]}, **further)
    assert_refused(NAMES.get(name, name), input_ids=TOKENS, attention_mask=MASK, generation_config=config)


def test_custom_generate_refuses_unsupported_options() -> None:
    spec = speculator()
    for options in (
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {CACHE: DynamicCache()},
        {"position_ids": torch.arange(WIDTH).expand(3, -1)},
        {"output_hidden_states": True},
    ):
        with pytest.raises(UnsupportedOptionError, match="not supported"):
            llama().generate(**batch(**options), custom_generate=spec)
    positions = (MASK.cumsum(dim=-1) - 1).clamp(min=0)  # as Hugging Face computes positions
    ours = llama().generate(**batch(position_ids=positions), custom_generate=spec)
    assert torch.equal(ours, llama().generate(**batch()))


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
@pytest.mark.parametrize("given", ["5", 17.5, [17]], ids=repr)
def test_a_length_must_be_a_whole_number(name: str, given: Any) -> None:
    config = GenerationConfig(do_sample=False)
    setattr(config, name, given)
    for options in ({name: given}, {"generation_config": config}):
        with pytest.raises(InputError) as refusal:
            speculator().generate(TOKENS, attention_mask=MASK, **options)
        assert str(refusal.value) == f"{name} is {given!r}, but it must be a whole number of tokens"


@pytest.mark.parametrize("seven", [np.int64(7), torch.tensor(7)], ids=["numpy", "torch"])
def test_a_length_may_be_any_whole_number(seven: Any) -> None:
    assert speculator().generate(**batch(max_new_tokens=seven)).shape == (3, WIDTH + 7)


def test_custom_generate_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="another model"):
        copy.deepcopy(llama()).generate(**batch(), custom_generate=speculator())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({}, "no prompt"),
        ({"input_ids": [[1, 2]]}, "must be a tensor"),
        ({"input_ids": torch.tensor([1, 2])}, "shape (2,)"),
        ({"input_ids": torch.ones(1, 2)}, "whole numbers"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, "empty"),
        ({"inputs": TOKENS, "input_ids": TOKENS}, "twice"),
        ({"input_ids": TOKENS, "generation_config": {"top_k": 3}}, "is a dict, but it must be a GenerationConfig"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, f"token {VOCABULARY}"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token -1"),
        ({"input_ids": TOKENS, "attention_mask": MASK.flip(1)}, "left"),
        ({"input_ids": TOKENS, "attention_mask": torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1]).expand(3, -1)}, "left"),
        ({"input_ids": torch.tensor([[3, PAD, 5]])}, "pad_token_id"),
        ({"input_ids": TOKENS, "attention_mask": torch.zeros_like(MASK)}, "empty"),
        ({"input_ids": TOKENS, "attention_mask": MASK[:, 1:]}, "attention_mask is (3, 8)"),
        ({"input_ids": TOKENS, "attention_mask": MASK, "max_length": WIDTH}, "max_length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unusable_prompt_is_refused_in_one_line(prompt: dict[str, Any], says: str) -> None:
    limit = {} if "max_length" in prompt else {"max_new_tokens": 3}
    assert_refused(says, **prompt, **limit)


def test_every_refusal_is_a_selfspec_error_and_leaves_the_object_usable() -> None:
    spec = speculator()
    for options in ({"num_beams": 2}, {"no_such_option": 1}, {"max_new_tokens": 0}):
        with pytest.raises(SelfspecError):
            spec.generate(**batch(**options))
    assert_same(**batch())


# --- The user's own criteria, and criteria that depend on time ---


class StopsAtLengths(StoppingCriteria):
    """Stops each row at its own length, and records the arguments of each call."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.seen = torch.tensor(lengths), []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append((input_ids.clone(), scores))
        return self.lengths <= input_ids.shape[1]


@pytest.mark.parametrize("eos", [None, 3], ids=["without a stop token", "with a stop token"])
def test_a_users_criterion_gets_the_arguments_that_hugging_face_passes(eos: int | None) -> None:
    theirs, ours = (StopsAtLengths(WIDTH + 3, WIDTH + 9, WIDTH + 6) for _ in range(2))
    options = batch(eos_token_id=eos, return_dict_in_generate=True, output_scores=True)
    expected = llama().generate(**options, stopping_criteria=StoppingCriteriaList([theirs]))
    output = speculator().generate(**options, stopping_criteria=StoppingCriteriaList([ours]))
    assert torch.equal(output.sequences, expected.sequences)
    assert len(ours.seen) == len(theirs.seen)
    for (tokens, scores), (their_tokens, their_scores) in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(tokens, their_tokens)
        torch.testing.assert_close(scores, their_scores, atol=1e-4, rtol=1e-4)
    assert "StopsAtLengths must see each context once" in output.stats.slower_paths[0]


class SaysYes(StoppingCriteria):
    """Gives one answer for the whole batch, as older criteria do."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] > WIDTH + 3


def test_a_criterion_may_give_one_answer_for_the_whole_batch() -> None:
    assert_same(**batch(stopping_criteria=StoppingCriteriaList([SaysYes()])))


def test_max_time_ends_every_row_after_the_first_round_that_took_longer() -> None:
    out = speculator().generate(TOKENS[1:2], max_new_tokens=400, max_time=0.0)
    assert out.shape[1] == WIDTH + 1
    late = StoppingCriteriaList([MaxTimeCriteria(max_time=1000.0)])
    assert_same(**batch(stopping_criteria=late, eos_token_id=3))


def test_a_plan_from_a_longer_draft_serves_a_shorter_request() -> None:
    model = damped_model("llama", ENDS_SKIPPED)
    assert_same(**batch(max_new_tokens=2), spec=wrap(model, Plan(skip_set=ENDS_SKIPPED, gamma=64)))
