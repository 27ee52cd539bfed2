"""Hugging Face validates and prepares a call of `generate`; the prepared call becomes a request."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from selfspec.decoding.logits_processors import needs_lockstep
from selfspec.decoding.request import Request
from selfspec.decoding.stats import Stats
from selfspec.errors import InputError, OptionWarning, UnsupportedOptionError
from selfspec.huggingface.options import check_arguments, check_prepared, max_length, set_aside
from selfspec.huggingface.output import SpeculativeOutput
from selfspec.models.rope import longrope_switch
from selfspec.plan.plan import Plan
from selfspec.policy import longest_draft


def through_hugging_face(
    model: PreTrainedModel,
    run: Callable[..., Any],
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList,
    kwargs: dict[str, Any],
    *,
    streams: bool = False,
) -> Any:
    """Let Hugging Face validate and prepare the inputs, then call `run` with them.

    Warns of options that stand only in the model's own generation config and are not supported.
    """
    aside = set_aside(model, generation_config, kwargs, streams=streams)
    check_arguments(model, inputs, generation_config, kwargs)
    own = model.generation_config
    if own is not None and own.cache_implementation is not None:
        kwargs["cache_implementation"] = "dynamic"  # otherwise Hugging Face allocates a cache that stays empty
        if own.cache_implementation == "quantized":  # other caches do not change the output
            aside.append("cache_implementation=quantized")
    if aside:
        options = ", ".join(aside)
        warnings.warn(
            f"the model's generation config has {options}, which selfspec does not support; decoding goes on without",
            OptionWarning,
            stacklevel=3,
        )
    prepared = False

    def begin(*args: Any, **arguments: Any) -> Any:
        nonlocal prepared
        prepared = True
        return run(*args, **arguments)

    try:
        return type(model).generate(  # type: ignore[attr-defined]  # not the instance's, which may be the speculator's own
            model,
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            custom_generate=begin,
            **kwargs,
        )
    except ValueError as error:
        if prepared:
            raise
        raise InputError(" ".join(str(error).split())) from error


@dataclass(kw_only=True)
class Prepared:
    """The arguments that Hugging Face passes to `custom_generate`. Unsupported arguments are refused on creation."""

    model: PreTrainedModel
    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        self.pads = check_prepared(self.model, self.input_ids, self.generation_config, self.model_kwargs)  # b

    def request(self, plan: Plan) -> Request | PlainDecoding:
        """The request for this call; if no view can serve the request, Hugging Face decodes it."""
        limit = max_length(self.stopping_criteria, self.input_ids.shape[1])
        lockstep = needs_lockstep(self.logits_processor, self.stopping_criteria, self.input_ids.shape[0])
        gamma = 0 if lockstep else longest_draft(plan)
        switch, width = longrope_switch(self.model), self.input_ids.shape[1]
        longest = int((width - self.pads).max())
        if torch.is_autocast_enabled(self.model.device.type):
            return PlainDecoding(self, "torch.autocast is on, which no view reproduces: model.generate decodes it")
        if switch is not None and longest <= switch < longest + limit - width:  # a view serves one side of the switch
            return PlainDecoding(self, "the request crosses the longrope switch: model.generate decodes it")
        config = self.generation_config
        pad = config._pad_token_tensor
        returns_dict = bool(config.return_dict_in_generate)
        return Request(
            prompts=self.input_ids.to(self.model.device, torch.long),
            pads=self.pads.to(self.model.device),
            max_length=limit,
            room=gamma + 1,
            sampling=bool(config.do_sample),
            processors=self.logits_processor,
            criteria=self.stopping_criteria,
            pad_token=0 if pad is None else int(pad),
            lockstep=lockstep,
            keep_scores=returns_dict and bool(config.output_scores),
            keep_logits=returns_dict and bool(config.output_logits),
        )


class Counting(StoppingCriteriaList):
    """Stopping criteria that count the tokens of each row up to the row's end.

    Hugging Face calls the criteria once for every token.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: Tensor) -> None:
        super().__init__(criteria)
        self._ended = torch.zeros(prompts.shape[0], dtype=torch.bool, device=prompts.device)  # b
        self._counts = torch.zeros_like(self._ended, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)  # type: ignore[assignment]
        self._counts += ~self._ended
        self._ended |= ended
        return ended

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows together."""
        return int(self._counts.sum())


@dataclass(frozen=True)
class PlainDecoding:
    """A request that Hugging Face decodes, since no view can serve the request; `reason` explains why."""

    prepared: Prepared
    reason: str

    @property
    def prompts(self) -> Tensor:
        return self.prepared.input_ids

    def decode(self, stats: Stats, streamer: BaseStreamer | None) -> Tensor | SpeculativeOutput:
        """The result of `model.generate`. `stats` counts the tokens and the time, even if the call fails."""
        call, criteria = self.prepared, Counting(self.prepared.stopping_criteria, self.prompts)
        if streamer is not None:
            streamer.put(self.prompts.cpu())
        try:
            with stats.timed("total"):
                output = call.model._sample(  # type: ignore[operator]
                    call.input_ids,
                    call.logits_processor,
                    criteria,
                    call.generation_config,
                    streamer=streamer,
                    **call.model_kwargs,
                )
        finally:
            stats.tokens = criteria.tokens
        return output if isinstance(output, Tensor) else SpeculativeOutput(**output, stats=stats)


def streamable(request: Request | PlainDecoding) -> Request:
    """The same request; raise a `SelfspecError` if it cannot be streamed."""
    if isinstance(request, PlainDecoding):
        advice = "ask for fewer new tokens, or use generate with a streamer"
        raise UnsupportedOptionError(f"{request.reason}, so it cannot be streamed; {advice}")
    if request.rows != 1:
        raise InputError(f"streaming serves one row, but {request.rows} were given; use generate")
    if request.keep_scores or request.keep_logits:
        raise UnsupportedOptionError("a stream yields tokens alone; for scores or logits, use generate")
    return request
