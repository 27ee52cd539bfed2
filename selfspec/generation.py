"""wrap and SelfSpeculator: Hugging Face's conventions at the edge."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
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
    "streamer": "a stream is itself what a streamer is for",
}
_CONFIG_DEFAULTS = {
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
}
_CACHE_DEFAULTS = {
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "cache_config": (None,),
}
"""What a user may not ask for; a model's own generation config may hold it, since it does not change what comes out."""
_EXPECTED_MODEL_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output without a cache, and `stats`. Scores and logits behind a row's own end are zeros."""

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
        """Of the latest call that began to decode, also if it was then broken off."""
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
    ) -> Generator[int, None, None]:
        """Yield the tokens of one row as rounds commit them; closing the generator ends the request."""
        rounds = self.stream_rounds(
            inputs, generation_config, logits_processor, stopping_criteria, tokenizer=tokenizer, **kwargs
        )
        with closing(rounds):
            for committed in rounds:
                for token in committed.tokens:
                    yield token
                    self._owner = threading.get_ident()  # the stream may have changed hands

    def stream_rounds(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Generator[Committed, None, None]:
        """Like `stream`, but yields each round whole: its tokens, and how many of them were drafted."""
        criteria = self._with_stop_strings(generation_config, stopping_criteria, tokenizer, kwargs)
        request: Request | _PlainDecoding = self._through_hugging_face(
            self._prepare, inputs, generation_config, logits_processor, criteria, kwargs
        )
        if isinstance(request, _PlainDecoding):
            raise UnsupportedOptionError(f"{request.reason}, so it cannot be streamed; use generate with a streamer")
        if request.rows != 1:
            raise InputError(f"streaming serves one row, but {request.rows} were given; use generate")
        if request.keep_scores or request.keep_logits:
            raise UnsupportedOptionError("a stream yields tokens alone; for scores or logits, use generate")
        with self._alone(), closing(self._rounds(request)) as rounds:
            for committed in rounds:
                for row in committed:
                    yield row
                    self._owner = threading.get_ident()  # as above

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
            if isinstance(request, _PlainDecoding):
                return self._decode_plainly(request, selfspec_streamer)
            streamed = _Streamed(selfspec_streamer, request) if selfspec_streamer is not None else None
            with closing(self._rounds(request)) as rounds:
                for committed in rounds:
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
        self._check_arguments(inputs, generation_config, kwargs)
        prepared = False

        def begin(*args: Any, **arguments: Any) -> Any:
            nonlocal prepared
            prepared = True
            return run(*args, **arguments)

        try:
            return self.model.generate(  # type: ignore[operator]
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

    def _check_arguments(
        self, inputs: Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> None:
        """Refuse what Hugging Face would act on, or drop, before a custom method could see it."""
        for name, what in _REFUSED_ARGUMENTS.items():
            if (value := kwargs.get(name)) is not None and value is not False:
                raise UnsupportedOptionError(f"{name} is not supported ({what}); leave it out, or use model.generate")
        own = self.model.generation_config
        _check_settings(kwargs, own)  # type: ignore[arg-type]
        _check_settings(vars(generation_config) if generation_config is not None else {}, own)  # type: ignore[arg-type]
        limit = kwargs.get("max_new_tokens")
        if limit is not None and limit < 1:
            raise InputError(f"max_new_tokens is {limit}, but at least one token must be asked for")
        if inputs is not None and kwargs.get("input_ids") is not None:
            raise InputError("the prompt was given twice, by position and as input_ids; give it once")
        self._check_tokens(inputs if inputs is not None else kwargs.get("input_ids"))
        if own is not None and own.cache_implementation is not None:
            kwargs["cache_implementation"] = "dynamic"  # else Hugging Face would allocate a cache that nobody fills

    def _check_tokens(self, tokens: Tensor | None) -> None:
        if not isinstance(tokens, Tensor):
            raise InputError(f"no prompt was given: input_ids must be a tensor (rows, tokens), not {tokens!r:.50}")
        if tokens.ndim != 2 or tokens.is_floating_point():
            kind = str(tokens.dtype).removeprefix("torch.")
            raise InputError(
                f"input_ids must be whole numbers (rows, tokens), not {kind} of shape {tuple(tokens.shape)}"
            )
        if tokens.numel() == 0:
            raise InputError(f"the prompt is empty: input_ids has shape {tuple(tokens.shape)}; give at least one token")
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
        strings = self._stop_strings(generation_config, kwargs)
        if not strings:
            return criteria
        if tokenizer is None:
            raise InputError(f"stop_strings {strings!r} need the model's tokenizer: pass tokenizer=...")
        kwargs["stop_strings"] = None
        if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # Hugging Face prefers the user's
            criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
        return criteria

    def _stop_strings(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> str | list[str] | None:
        """Hugging Face's precedence: the keyword, also if it is None; the config given; the model's own."""
        if "stop_strings" in kwargs:
            return kwargs["stop_strings"]  # type: ignore[no-any-return]
        given = getattr(generation_config, "stop_strings", None)
        return given if given is not None else getattr(self.model.generation_config, "stop_strings", None)

    def _prepare(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Request | _PlainDecoding:
        """The request for what Hugging Face prepared; or, where no view can serve it, a call of its own decoding."""
        _check_settings(vars(generation_config), model.generation_config)  # type: ignore[arg-type]
        _check_mode(generation_config)
        given = {name for name, value in model_kwargs.items() if value is not None}
        if unexpected := given - _EXPECTED_MODEL_ARGUMENTS:
            raise UnsupportedOptionError(
                f"{', '.join(sorted(unexpected))}: not supported; leave it out, or use model.generate"
            )
        cache = model_kwargs.get("past_key_values")
        if getattr(cache, "_is_user_defined", False):
            raise UnsupportedOptionError(f"past_key_values is not supported ({_REFUSED_ARGUMENTS['past_key_values']})")
        pads = _padding(input_ids, model_kwargs.get("attention_mask"))
        _check_positions(model_kwargs.get("position_ids"), input_ids, pads)
        max_length = _max_length(stopping_criteria, input_ids.shape[1])
        lockstep = needs_lockstep(logits_processor, stopping_criteria, input_ids.shape[0])
        gamma = 0 if lockstep else self.plan.gamma
        switch = longrope_switch(model)
        longest = int((input_ids.shape[1] - pads).max())
        if switch is not None and longest <= switch < longest + max_length - input_ids.shape[1]:

            def run(streamer: BaseStreamer | None) -> Any:
                return model._sample(  # type: ignore[operator]
                    input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
                )

            return _PlainDecoding(run, input_ids, "the request crosses the longrope switch: model.generate decodes it")
        pad = generation_config._pad_token_tensor
        returns_dict = bool(generation_config.return_dict_in_generate)
        return Request(
            prompts=input_ids.to(model.device, torch.long),
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

    def _rounds(self, request: Request) -> Generator[list[Committed], None, None]:
        self.runtime.refresh()
        switch = longrope_switch(self.model)
        if switch is not None:
            longest = request.prompts.shape[1] - int(request.pads.min())
            self.runtime.pin_longrope(long=longest > switch)
        choice = self.runtime.backend
        self.stats = Stats(
            rows=request.rows,
            backend=choice.backend.name,
            backend_reason=choice.reason,
            compiled=self.runtime.compile,
            slower_paths=[f"plain lock-step decoding: {reason}" for reason in request.lockstep],
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

    def _decode_plainly(self, plain: _PlainDecoding, streamer: BaseStreamer | None) -> Tensor | SpeculativeOutput:
        self.stats = Stats(rows=plain.prompts.shape[0], slower_paths=[plain.reason])
        if streamer is not None:
            streamer.put(plain.prompts.cpu())
        with self.stats.timed("total"):
            output = plain.run(streamer)
        return output if isinstance(output, Tensor) else SpeculativeOutput(**output, stats=self.stats)

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


@dataclass(frozen=True)
class _PlainDecoding:
    """A request that no view can serve, as a call of Hugging Face's own decoding, and why."""

    run: Callable[[BaseStreamer | None], Any]
    prompts: Tensor
    reason: str


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


def _check_settings(settings: Mapping[str, Any], own: GenerationConfig) -> None:
    """Refuse what would otherwise be ignored."""
    for name, defaults in (_CONFIG_DEFAULTS | _CACHE_DEFAULTS).items():
        value = settings.get(name)
        is_own = name in _CACHE_DEFAULTS and value == getattr(own, name, None)
        if value not in defaults and not is_own:
            raise UnsupportedOptionError(f"{name}={value} is not supported; leave it out, or use model.generate")


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedOptionError(
            f"{mode.value} is not supported, only greedy decoding and sampling; use model.generate"
        )


def _max_length(criteria: StoppingCriteriaList, width: int) -> int:
    """Where every row ends at the latest. Hugging Face looks at its criteria only after a first new token."""
    limits = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    assert limits, "Hugging Face always sets a maximum length"
    return max(min(limits), width + 1)


def _check_positions(position_ids: Tensor | None, input_ids: Tensor, pads: Tensor) -> None:
    """Refuse positions that do not count each prompt's own tokens from 0."""
    if position_ids is None:
        return
    expected = torch.arange(input_ids.shape[1], device=pads.device) - pads[:, None]  # b t
    given = position_ids.expand_as(expected) if position_ids.shape[-1] == expected.shape[-1] else None
    if given is None or not torch.equal(given[expected >= 0], expected[expected >= 0]):
        raise UnsupportedOptionError(f"position_ids is not supported ({_REFUSED_ARGUMENTS['position_ids']})")


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
        raise InputError(
            "attention_mask must be padding on the left, then ones; set tokenizer.padding_side = 'left' "
            "(where no mask is given, Hugging Face masks every pad_token_id)"
        )
    return pads
