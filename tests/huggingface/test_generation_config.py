"""What stands only in a model's own generation config: followed where it can be, else turned off with one warning."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from models import prompts
from pairs import llama, speculator
from saved import PLAN, save_model
from selfspec_search.replay.processing import processors_of

from selfspec import OptionWarning, SelfSpeculator, SpeculativeOutput, UnsupportedOptionError, wrap
from selfspec.benchmark.contenders import OURS, line_up

TOKENS, MASK = prompts(5, 9, 2)
GIVEN: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 7}
ONE: dict[str, Any] = {"input_ids": TOKENS[1:2], "max_new_tokens": 7}

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 2},
    "use_mtp": {"use_mtp": True},
    "token_healing": {"token_healing": True},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "cache_implementation": {"cache_implementation": "quantized"},
}
"""By the name in the warning: settings of a model's own generation config."""


def with_own(**settings: Any) -> SelfSpeculator:
    """The shared model with these settings in its own generation config."""
    model = copy.deepcopy(llama())
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return wrap(model, speculator().plan)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_setting_of_the_models_own_is_turned_off_with_one_warning(name: str) -> None:
    spec = with_own(**UNSUPPORTED[name])
    own = spec.model.generation_config
    before, edited = own.to_dict(), copy.deepcopy(own)
    expected = llama().generate(**GIVEN)
    with pytest.warns(OptionWarning) as warned:
        assert torch.equal(spec.generate(**GIVEN), expected)
    assert len(warned) == 1
    assert f"{name}={UNSUPPORTED[name][name]}" in str(warned[0].message)
    assert warned[0].filename == __file__, "the warning names the caller's line"
    edited.repetition_penalty = 2.5  # other settings of a copy are asked for, and this one is not
    with pytest.warns(OptionWarning, match=name):
        ours = spec.generate(**GIVEN, generation_config=edited)
    assert torch.equal(ours, llama().generate(**GIVEN, repetition_penalty=2.5))
    with pytest.warns(OptionWarning, match=name):
        assert list(spec.stream(**ONE)) == expected[1, TOKENS.shape[1] :].tolist()
    assert own.to_dict() == before


@pytest.mark.parametrize(
    ("name", "other"), [("num_beams", 2), ("prompt_lookup_num_tokens", 9), ("output_attentions", True)]
)
def test_the_same_setting_is_refused_where_the_call_asks_for_it(name: str, other: Any) -> None:
    own = UNSUPPORTED[name]
    spec, config = with_own(**own), copy.deepcopy(llama().generation_config)
    setattr(config, name, other)
    for refusing in (
        lambda: spec.generate(**GIVEN, **own),
        lambda: spec.model.generate(**GIVEN, custom_generate=spec),  # cannot know who asked
        lambda: speculator().generate(**GIVEN, generation_config=config),
        lambda: with_own(**{name: own[name] + 1}).generate(**GIVEN, generation_config=config),
    ):
        with pytest.raises(UnsupportedOptionError, match=name):
            refusing()


def test_a_call_that_turns_the_setting_off_is_served_without_a_warning() -> None:
    spec, expected = with_own(num_beams=3, output_attentions=True), llama().generate(**GIVEN)
    off = {"num_beams": 1, "output_attentions": False}
    assert torch.equal(spec.generate(**GIVEN, **off), expected)
    assert torch.equal(spec.generate(**GIVEN, **dict.fromkeys(off)), expected)
    config = copy.deepcopy(spec.model.generation_config)
    config.num_beams, config.output_attentions = 1, False
    assert torch.equal(spec.generate(**GIVEN, generation_config=config), expected)
    assert torch.equal(spec.model.generate(**GIVEN, generation_config=config, custom_generate=spec), expected)


def test_settings_without_an_effect_of_their_own_need_no_warning() -> None:
    idle = {"num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 2.0, "early_stopping": True}
    idle |= {"low_memory": True, "num_assistant_tokens": 7, "assistant_confidence_threshold": 0.2}
    assert torch.equal(with_own(**idle, use_cache=False).generate(**GIVEN), llama().generate(**GIVEN))


def test_an_output_object_and_further_sequences_are_returned_as_by_model_generate() -> None:
    spec = with_own(return_dict_in_generate=True, output_scores=True, output_attentions=True)
    with pytest.warns(OptionWarning, match="has output_attentions=True, which"):
        ours = spec.generate(**GIVEN)
    theirs = spec.model.generate(**GIVEN)
    assert isinstance(ours, SpeculativeOutput)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)
    assert ours.attentions is None
    spec = with_own(do_sample=True, num_return_sequences=3)
    assert spec.generate(**GIVEN).shape == (9, TOKENS.shape[1] + 7)


def test_a_stream_yields_tokens_whatever_output_the_models_own_config_has() -> None:
    spec = with_own(return_dict_in_generate=True, output_logits=True, do_sample=True, top_k=1, num_return_sequences=2)
    with pytest.warns(OptionWarning, match="num_return_sequences=2"):
        tokens = list(spec.stream(**ONE))
    assert tokens == llama().generate(**ONE)[0, TOKENS.shape[1] :].tolist()


def test_a_benchmark_of_a_model_with_beams_and_stop_strings_decodes_greedily() -> None:
    model = with_own(num_beams=3, return_dict_in_generate=True, stop_strings=["a"]).model
    contenders = line_up(model, speculator().plan, [TOKENS[1]], 7, peers=False).contenders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptionWarning)
        texts = {contender.name: contender.decode(TOKENS[1], 7).tolist() for contender in contenders}
    assert set(map(tuple, texts.values())) == {tuple(llama().generate(**ONE)[0, TOKENS.shape[1] :].tolist())}
    assert OURS in texts


def test_the_search_replays_the_processors_of_a_model_with_beams_and_stop_strings() -> None:
    own = {"num_beams": 3, "num_return_sequences": 3, "stop_strings": ["a"], "output_attentions": True}
    processors = processors_of({"do_sample": True, "temperature": 0.5}, with_own(**own).model)
    assert "TemperatureLogitsWarper" in [type(processor).__name__ for processor in processors]


# --- The command line ---


@pytest.fixture
def generate(tmp_path: Path) -> Any:
    """`selfspec generate` of a model with these settings in its generation_config.json."""
    plan = PLAN.save_pretrained(tmp_path / "plan")
    directory = save_model(tmp_path / "model")
    file = directory / "generation_config.json"
    before = json.loads(file.read_text())

    def run_with(**settings: Any) -> str:
        file.write_text(json.dumps(before | settings))
        command = ("generate", directory, "--plan", plan, "--prompt", "class", "--max-new-tokens", 30)
        result = run(*command, "--device", "cpu")
        assert result.exit_code == 0, result.output
        return result.stdout

    return run_with


def test_the_command_line_stops_at_stop_strings_of_the_models_own_config(generate: Any) -> None:
    text = generate()
    stop = next(char for char in text[3:] if "!" <= char <= "~")
    end = text.index(stop) + 1
    assert end < len(text) - 3
    assert generate(stop_strings=[stop]) == text[:end] + "\n"


def test_the_command_line_turns_unsupported_settings_off(generate: Any) -> None:
    with pytest.warns(OptionWarning, match="num_beams=3, return_dict_in_generate=True"):
        text = generate(num_beams=3, return_dict_in_generate=True)
    assert text == generate()
