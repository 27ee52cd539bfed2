"""The supported options of `model.generate`, and an error of one line for each unsupported option.

Hugging Face validates most options. This module checks the options that Hugging Face would use or drop before a custom
decoding method could read the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from selfspec.errors import InputError, UnsupportedOptionError
from selfspec.utils.devices import dtype_name

_REFUSED_ARGUMENTS = {
    "assistant_model": "a second model",
    "assistant_tokenizer": "a second model",
    "inputs_embeds": "embeddings in place of tokens",
    "past_key_values": "another cache; the runtime owns its cache",
    "cache": "another cache; the runtime owns its cache",
    "cache_implementation": "another cache; the runtime owns its cache",
    "cache_config": "another cache; the runtime owns its cache",
    "position_ids": "other positions; attention_mask defines the positions",
    "custom_generate": "another decoding method",
    "synced_gpus": "a model spread over several devices",
    "output_attentions": "attention weights",
    "output_hidden_states": "hidden states",
    "streamer": "a stream already yields each token",
}
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "token_healing": (False, None),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (False, None),
}
"""Options that Hugging Face would drop or follow before a custom decoding method; for each, the values that turn the
option off."""
_UNSERVED_METHODS: dict[str, tuple[Any, ...]] = {
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
}
"""Further options of decoding methods that are not supported; for each, the values that turn the option off."""
_ONE_SEQUENCE: dict[str, tuple[Any, ...]] = {"num_return_sequences": (1, None)}
_TOKENS_ALONE: dict[str, tuple[Any, ...]] = {
    "return_dict_in_generate": (False, None),
    "output_scores": (False, None),
    "output_logits": (False, None),
}
_CACHE_DEFAULTS = {
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "cache_config": (None,),
}
"""The values that a user may give. A model's own generation config may have others, which do not change the output."""
LONGEST = 2**62
"""Tokens: no row becomes so long, and the device can still count them."""
_CACHE_NAMES = ("past_key_values", "cache")
"""The cache's name in transformers before 5.24, and since."""
_EXPECTED_MODEL_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", *_CACHE_NAMES}
)


def check_arguments(
    model: PreTrainedModel, inputs: Tensor | None, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> None:
    """Refuse arguments of `generate` before Hugging Face sees them."""
    for name, what in _REFUSED_ARGUMENTS.items():
        if (value := kwargs.get(name)) is not None and value is not False:
            raise UnsupportedOptionError(f"{name} is not supported ({what}); leave it out, or use model.generate")
    if config is not None and not isinstance(config, GenerationConfig):
        given = type(config).__name__
        raise InputError(
            f"generation_config is a {given}, but it must be a GenerationConfig; or pass its settings by name"
        )
    for settings in ({} if config is None else vars(config) | kwargs, kwargs):  # keywords override the config
        _check_settings(settings, model.generation_config)  # type: ignore[arg-type]
        _check_limits(settings)
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise InputError("the prompt was given twice, by position and as input_ids; give it once")
    _check_tokens(model, inputs if inputs is not None else kwargs.get("input_ids"))


def set_aside(
    model: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any], *, streams: bool = False
) -> list[str]:
    """Turn off, in `kwargs`, unsupported options that stand only in the model's own generation config; return them.

    An option that the call itself gives, in `kwargs` or in `config`, is left for `check_arguments`. `streams` turns off
    what a stream of one row cannot return as well.
    """
    own, aside = model.generation_config, []
    samples = (kwargs.get("do_sample"), getattr(config, "do_sample", None), getattr(own, "do_sample", None))
    options = _UNSERVED | _UNSERVED_METHODS | (_TOKENS_ALONE if streams else {})
    if streams or not next((value for value in samples if value is not None), False):
        options |= _ONE_SEQUENCE
    for name, (off, *equivalents) in options.items():
        value, in_config = getattr(own, name, None), getattr(config, name, None)
        if name in kwargs:
            kwargs[name] = off if kwargs[name] is None else kwargs[name]
        elif value not in (off, *equivalents) and in_config in (None, value):
            kwargs[name] = off
            aside.append(f"{name}={value}")
    return aside


def check_prepared(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> Tensor:
    """Refuse unsupported options that Hugging Face accepted; return the tokens of padding before each prompt, `b`."""
    _check_settings(vars(config), model.generation_config)  # type: ignore[arg-type]
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedOptionError(
            f"{mode.value} is not supported, only greedy decoding and sampling; use model.generate"
        )
    given = {name for name, value in model_kwargs.items() if value is not None}
    if unexpected := given - _EXPECTED_MODEL_ARGUMENTS:
        raise UnsupportedOptionError(
            f"{', '.join(sorted(unexpected))}: not supported; leave it out, or use model.generate"
        )
    for name in _CACHE_NAMES:
        if getattr(model_kwargs.get(name), "_is_user_defined", False):
            raise UnsupportedOptionError(f"{name} is not supported ({_REFUSED_ARGUMENTS[name]})")
    pads = _padding(input_ids, model_kwargs.get("attention_mask"))
    _check_positions(model_kwargs.get("position_ids"), input_ids, pads)
    return pads


def max_length(criteria: StoppingCriteriaList, width: int) -> int:
    """The greatest length of a row, up to `LONGEST`. Hugging Face checks the criteria only after a first new token."""
    limits = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    assert limits, "Hugging Face always sets a maximum length"
    return max(min(*limits, LONGEST), width + 1)


def with_stop_strings(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None,
    stopping_criteria: StoppingCriteriaList | None,
    tokenizer: PreTrainedTokenizerBase | None,
    kwargs: dict[str, Any],
) -> StoppingCriteriaList:
    """Turn stop strings into a criterion, since Hugging Face drops `tokenizer` before a custom method could use it."""
    criteria = StoppingCriteriaList(stopping_criteria or [])
    strings = getattr(generation_config, "stop_strings", None)
    strings = getattr(model.generation_config, "stop_strings", None) if strings is None else strings
    strings = kwargs.get("stop_strings", strings)  # as in Hugging Face, the keyword counts even if it is None
    if not strings:
        return criteria
    if tokenizer is None:
        raise InputError(
            f"stop_strings {strings!r} need the model's tokenizer: pass tokenizer=..., or stop_strings=None to go "
            "without them"
        )
    kwargs["stop_strings"] = None
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # Hugging Face prefers the user's
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    return criteria


def _check_settings(settings: Mapping[str, Any], own: GenerationConfig) -> None:
    """Refuse options that Hugging Face would ignore in a custom decoding method."""
    for name, defaults in (_UNSERVED | _CACHE_DEFAULTS).items():
        value = settings.get(name)
        is_own = value == getattr(own, name, None)
        if value in defaults or (is_own and name in _CACHE_DEFAULTS):
            continue
        advice = f"pass {name}={defaults[0]}" if is_own else "leave it out"
        raise UnsupportedOptionError(f"{name}={value} is not supported; {advice}, or use model.generate")


def _check_limits(settings: Mapping[str, Any]) -> None:
    for name in ("max_new_tokens", "max_length"):
        limit = settings.get(name)
        if limit is None:
            continue
        try:
            given = index(limit)
        except TypeError:
            raise InputError(f"{name} is {limit!r:.50}, but it must be a whole number of tokens") from None
        if name == "max_new_tokens" and given < 1:
            raise InputError(f"{name} is {given}, but it must be at least 1")


def _check_tokens(model: PreTrainedModel, tokens: Tensor | None) -> None:
    if not isinstance(tokens, Tensor):
        raise InputError(f"no prompt was given: input_ids must be a tensor (rows, tokens), not {tokens!r:.50}")
    if tokens.ndim != 2 or tokens.is_floating_point():
        given = f"{dtype_name(tokens.dtype)} of shape {tuple(tokens.shape)}"
        raise InputError(f"input_ids must be whole numbers (rows, tokens), not {given}")
    if tokens.numel() == 0:
        raise InputError(f"the prompt is empty: input_ids has shape {tuple(tokens.shape)}; give at least one token")
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    highest, lowest = int(tokens.max()), int(tokens.min())
    if highest >= vocabulary or lowest < 0:
        raise InputError(
            f"the prompt holds token {highest if highest >= vocabulary else lowest}, but the model's vocabulary is "
            f"0..{vocabulary - 1}; use the tokenizer that belongs to the model"
        )


def _check_positions(position_ids: Tensor | None, input_ids: Tensor, pads: Tensor) -> None:
    """Refuse positions that do not count each prompt's tokens from 0."""
    if position_ids is None:
        return
    expected = torch.arange(input_ids.shape[1], device=pads.device) - pads[:, None]  # b t
    given = position_ids.expand_as(expected) if position_ids.shape[-1] == expected.shape[-1] else None
    if given is None or not torch.equal(given[expected >= 0], expected[expected >= 0]):
        raise UnsupportedOptionError(f"position_ids is not supported ({_REFUSED_ARGUMENTS['position_ids']})")


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The tokens of padding before each prompt, `b`."""
    if attention_mask is None:
        return torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {tuple(attention_mask.shape)}, but input_ids is {tuple(input_ids.shape)}")
    visible = attention_mask.bool()
    if not visible.any(dim=1).all():
        raise InputError("a prompt is empty: its attention_mask holds no 1")
    pads = visible.long().argmax(dim=1)
    if not torch.equal(visible, torch.arange(visible.shape[1], device=visible.device) >= pads[:, None]):
        raise InputError(
            "attention_mask must be padding on the left, then ones; set tokenizer.padding_side = 'left' "
            "(without a mask, Hugging Face masks every pad_token_id)"
        )
    return pads
