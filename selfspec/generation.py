"""wrap and SelfSpeculator: Hugging Face's conventions at the edge."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from selfspec.decoding import decode
from selfspec.drafting import Drafter, LayerSkipDrafter, NoDrafter
from selfspec.errors import InputError, SelfspecError, UnsupportedOptionError
from selfspec.plan import Plan
from selfspec.processors import needs_lockstep
from selfspec.request import Committed, Request
from selfspec.runtime import Runtime
from selfspec.stats import Stats
from selfspec.views import longrope_switch

_REFUSED_ARGUMENTS = {
    "assistant_model": "a second model",
    "assistant_tokenizer": "a second model",
    "inputs_embeds": "embeddings in place of tokens",
    "past_key_values": "a cache from elsewhere; the runtime owns its cache",
    "cache_implementation": "another cache; the runtime owns its cache",
    "cache_config": "another cache; the runtime owns its cache",
    "position_ids": "positions of your own; they follow from attention_mask",
    "custom_generate": "another decoding method",
    "synced_gpus": "a model spread over several devices",
    "output_attentions": "attention weights",
    "output_hidden_states": "hidden states",
}
_CONFIG_DEFAULTS = {
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_cache": (None, True),
}
_EXPECTED_MODEL_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output, and `stats`. Scores and logits behind a row's own end are zeros."""

    stats: Stats | None = None


def wrap(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike[str],
    *,
    backend: str | None = None,
    compile: bool = False,
) -> SelfSpeculator:
    """Make `model` decode speculatively by `plan`: the same output, sooner.

    Args:
        model: a supported causal language model. It stays untouched and usable.
        plan: a `Plan`, a plan file, or a directory that holds one.
        backend: an attention backend by name (`flash-attn`, `torch-flash`, `sdpa`); by default the best that serves.
        compile: fuse the passes with `torch.compile`: slower to start, faster to run.

    Raises:
        UnsupportedModelError: the family is not among those tested, or the probe found a difference.
        PlanError: the plan is malformed, or made for another model.
    """
    return SelfSpeculator(model, plan, backend=backend, compile=compile)


class SelfSpeculator:
    """A model with a plan. `generate` takes what `model.generate` takes and returns what it returns.

    One request runs at a time; calls from other threads wait. Also usable as `model.generate(custom_generate=self)`
    with the model it wraps, but Hugging Face then drops `streamer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | str | os.PathLike[str],
        *,
        backend: str | None = None,
        compile: bool = False,
    ) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.from_pretrained(plan)
        self.model = model
        self.runtime = Runtime(model, backend=backend, compile=compile)
        self.plan.check_fits(model.config)
        self.runtime.skip(self.plan.skip_set)
        self.stats = Stats()
        """Of the latest call."""
        self._lock = threading.Lock()
        self._owner: int | None = None

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """What `model.generate` returns: `b length` tokens, or an output object if `return_dict_in_generate`.

        Greedy output is `model.generate`'s, token for token; sampled output has the same distribution, not the same
        draws. What cannot be served is refused by `UnsupportedOptionError`.
        """
        criteria = self._with_stop_strings(generation_config, stopping_criteria, tokenizer, kwargs)

        def run(*args: Any, **prepared: Any) -> Tensor | SpeculativeOutput:
            return self(*args, **prepared, selfspec_streamer=streamer)  # type: ignore[misc]

        result: Tensor | SpeculativeOutput = self._through_hugging_face(
            run, inputs, generation_config, logits_processor, criteria, kwargs
        )
        return result

    def stream(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Iterator[int]:
        """Yield the tokens of one row as rounds commit them; closing the generator ends the request."""
        for committed in self.stream_rounds(
            inputs, generation_config, logits_processor, stopping_criteria, tokenizer=tokenizer, **kwargs
        ):
            yield from committed.tokens

    def stream_rounds(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Iterator[Committed]:
        """Like `stream`, but yields each round whole: its tokens, and how many of them were drafted."""
        criteria = self._with_stop_strings(generation_config, stopping_criteria, tokenizer, kwargs)
        request: Request | Callable[[], Any] = self._through_hugging_face(
            self._prepare, inputs, generation_config, logits_processor, criteria, kwargs
        )
        if not isinstance(request, Request):
            raise UnsupportedOptionError(
                "this request crosses the longrope switch and cannot be streamed; use generate"
            )
        if request.rows != 1:
            raise InputError(f"streaming serves one row, but {request.rows} were given; use generate")
        with self._alone():
            for committed in self._rounds(request):
                yield from committed

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        selfspec_streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Hugging Face's `custom_generate` protocol."""
        if model is not self.model:
            raise InputError("custom_generate was given to another model than the one that selfspec.wrap was given")
        request = self._prepare(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
        )
        with self._alone():
            if not isinstance(request, Request):
                self.stats = Stats(slower_paths=["the request crosses the longrope switch: model.generate decodes it"])
                return request(streamer=selfspec_streamer)  # type: ignore[no-any-return]
            streamed = _Streamed(selfspec_streamer, request) if selfspec_streamer is not None else None
            for committed in self._rounds(request):
                if streamed is not None:
                    streamed.put(committed)
            if streamed is not None:
                streamed.end()
            return self._output(request, generation_config)

    # --- Preparing a request ---

    def _through_hugging_face(
        self,
        run: Callable[..., Any],
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList,
        kwargs: dict[str, Any],
    ) -> Any:
        """Let Hugging Face validate and prepare the inputs, then call `run` with them."""
        for name, what in _REFUSED_ARGUMENTS.items():
            if kwargs.get(name) not in (None, False):
                raise UnsupportedOptionError(f"{name} is not supported ({what}); leave it out, or use model.generate")
        limit = kwargs.get("max_new_tokens")
        if limit is not None and limit < 1:
            raise InputError(f"max_new_tokens is {limit}, but at least one token must be asked for")
        tokens = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_tokens(tokens)
        return self.model.generate(  # type: ignore[operator]
            inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            custom_generate=run,
            **kwargs,
        )

    def _check_tokens(self, tokens: Tensor | None) -> None:
        if tokens is None or tokens.ndim != 2 or tokens.numel() == 0:
            shape = None if tokens is None else tuple(tokens.shape)
            raise InputError(
                f"the prompt is empty: input_ids of shape (rows, tokens) is expected, but {shape} was given"
            )
        vocabulary: int = self.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        highest, lowest = int(tokens.max()), int(tokens.min())
        if highest >= vocabulary or lowest < 0:
            raise InputError(
                f"the prompt holds token {highest if highest >= vocabulary else lowest}, but the model's vocabulary is "
                f"0..{vocabulary - 1}; use the tokenizer that belongs to the model"
            )

    def _with_stop_strings(
        self,
        generation_config: GenerationConfig | None,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None,
        kwargs: dict[str, Any],
    ) -> StoppingCriteriaList:
        """Stop strings as a criterion: Hugging Face drops `tokenizer` before a custom method could use it."""
        criteria = StoppingCriteriaList(stopping_criteria or [])
        config = generation_config or self.model.generation_config
        strings = kwargs.pop("stop_strings", None) or config.stop_strings
        if not strings:
            return criteria
        if tokenizer is None:
            raise InputError(f"stop_strings {strings!r} need the model's tokenizer: pass tokenizer=...")
        kwargs["stop_strings"] = None
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
        return criteria

    def _prepare(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Request | Callable[..., Any]:
        """The request for what Hugging Face prepared; or, where no view can serve it, a call of its own decoding."""
        _check_config(generation_config)
        if unexpected := set(model_kwargs) - _EXPECTED_MODEL_ARGUMENTS:
            raise UnsupportedOptionError(
                f"{', '.join(sorted(unexpected))}: not supported; leave it out, or use model.generate"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedOptionError(f"past_key_values is not supported ({_REFUSED_ARGUMENTS['past_key_values']})")
        lockstep = needs_lockstep(logits_processor, stopping_criteria)
        max_length = stopping_criteria.max_length
        assert max_length is not None, "Hugging Face always sets a maximum length"
        pads = _padding(input_ids, model_kwargs.get("attention_mask"))
        gamma = 0 if lockstep else self.plan.gamma
        switch = longrope_switch(model)
        if switch is not None:
            longest = int((input_ids.shape[1] - pads).max())
            if longest <= switch < longest + max_length - input_ids.shape[1] + gamma + 1:
                return lambda streamer=None: model._sample(  # type: ignore[operator]
                    input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
                )
            self.runtime.pin_longrope(long=longest > switch)
        pad = generation_config._pad_token_tensor
        returns_dict = bool(generation_config.return_dict_in_generate)
        return Request(
            prompts=input_ids.to(model.device),
            pads=pads.to(model.device),
            max_length=max_length,
            room=gamma + 1,
            sampling=bool(generation_config.do_sample),
            processors=logits_processor,
            criteria=stopping_criteria,
            pad_token=0 if pad is None else int(pad),
            lockstep=lockstep,
            keep_scores=returns_dict and bool(generation_config.output_scores),
            keep_logits=returns_dict and bool(generation_config.output_logits),
        )

    # --- Running it ---

    def _rounds(self, request: Request) -> Iterator[list[Committed]]:
        self.runtime.refresh()
        choice = self.runtime.backend
        self.stats = Stats(
            rows=request.rows,
            backend=choice.backend.name,
            backend_reason=choice.reason,
            compiled=self.runtime.compile,
            slower_paths=[f"plain lock-step decoding: {name} must see each context once" for name in request.lockstep],
        )
        drafter: Drafter = NoDrafter()
        if self.plan.speculates and not request.lockstep:
            drafter = LayerSkipDrafter(self.runtime, self.plan.gamma, self.plan.exit_threshold)
        self.runtime.reserve(request.rows, request.max_length + request.room)
        whole = False
        try:
            yield from decode(self.runtime, drafter, request, self.stats)
            whole = True
        finally:
            if not whole:  # an error may have left a NaN behind, even in a slot that is masked
                self.runtime.cache.scrub()

    def _output(self, request: Request, generation_config: GenerationConfig) -> Tensor | SpeculativeOutput:
        sequences = request.result()
        if not generation_config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=request.result_steps(request.scores) if request.keep_scores else None,  # type: ignore[arg-type]
            logits=request.result_steps(request.logits) if request.keep_logits else None,  # type: ignore[arg-type]
            stats=self.stats,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One request at a time; a second one from the same thread would wait for itself, so it is refused."""
        if self._owner == threading.get_ident():
            raise SelfspecError("a stream of this object is still open in this thread; exhaust or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None


class _Streamed:
    """Feeds a Hugging Face streamer: the prompt, then one `b` of tokens a step, as soon as every row has that step."""

    def __init__(self, streamer: BaseStreamer, request: Request) -> None:
        self.streamer, self.request = streamer, request
        self.rows: list[list[int]] = [[] for _ in range(request.rows)]
        self.sent = 0
        streamer.put(request.prompts.cpu())

    def put(self, committed: list[Committed]) -> None:
        for row in committed:
            self.rows[row.row].extend(row.tokens)
        finished = self.request.finished.tolist()
        ready = [len(row) for row, done in zip(self.rows, finished, strict=True) if not done]
        self._send(min(ready) if ready else max(map(len, self.rows)))

    def end(self) -> None:
        self.streamer.end()

    def _send(self, until: int) -> None:
        pad = self.request.pad_token
        for step in range(self.sent, until):
            self.streamer.put(torch.tensor([row[step] if step < len(row) else pad for row in self.rows]))
        self.sent = max(self.sent, until)


def _check_config(config: GenerationConfig) -> None:
    """Refuse what would otherwise be ignored."""
    for name, defaults in _CONFIG_DEFAULTS.items():
        if (value := getattr(config, name, None)) not in defaults:
            raise UnsupportedOptionError(f"{name}={value} is not supported; leave it out, or use model.generate")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedOptionError(
            f"{mode.value} is not supported, only greedy decoding and sampling; use model.generate"
        )


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How many tokens of padding stand before each prompt, `b`."""
    if attention_mask is None:
        return torch.zeros(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {tuple(attention_mask.shape)}, but input_ids is {tuple(input_ids.shape)}")
    visible = attention_mask.bool()
    if not visible.any(dim=1).all():
        raise InputError("a prompt is empty: its attention_mask holds no 1")
    pads = visible.long().argmax(dim=1)
    if not torch.equal(visible, torch.arange(visible.shape[1], device=visible.device) >= pads[:, None]):
        raise InputError("attention_mask must be padding on the left, then ones; set tokenizer.padding_side = 'left'")
    return pads
