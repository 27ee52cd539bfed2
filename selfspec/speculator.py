"""wrap and SelfSpeculator: Hugging Face's conventions at the edge."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import closing
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from selfspec.decode_options import DecodeOptions, PolicyName
from selfspec.decoding.acceptance import Committed
from selfspec.decoding.drafter import Drafter, NoDrafter
from selfspec.decoding.request import Request
from selfspec.decoding.round import decode, is_captured
from selfspec.decoding.stats import Stats
from selfspec.drafters.draft_model import check_plan, draft_model_bytes, draft_runtime, refresh
from selfspec.errors import InputError, PlanWarning, UnsupportedOptionError
from selfspec.huggingface.generate_call import PlainDecoding, Prepared, through_hugging_face
from selfspec.huggingface.options import with_stop_strings
from selfspec.huggingface.output import SpeculativeOutput, output_of
from selfspec.huggingface.streamer import Streamed
from selfspec.models.draft_weights import draft_weight_bytes, unsupported_reasons
from selfspec.models.support import check_supported
from selfspec.plan import Plan
from selfspec.policy import drafter_for, too_many_rows
from selfspec.runtime.cuda_graphs import Recorder
from selfspec.runtime.runtime import Runtime
from selfspec.utils.request_lock import RequestLock


def wrap(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike[str],
    *,
    backend: str | None = None,
    compile: bool | None = None,
    graphs: bool | None = None,
    policy: PolicyName = "adaptive",
    draft_memory: int | str | None = None,
    draft_model: PreTrainedModel | None = None,
) -> SelfSpeculator:
    """Make `model` decode speculatively by `plan`: the same output, sooner.

    Args:
        model: a supported causal language model. It stays untouched and usable.
        plan: a `Plan`, a plan file, or a directory that holds one.
        backend: an attention backend by name (`flash-attn`, `torch-flash`, `sdpa`); by default the best that serves.
        compile: fuse the passes with `torch.compile`: slower to start, faster to run. By default on CUDA only: on a CPU
            it takes tens of seconds for every pass length.
        graphs: capture rounds as CUDA graphs; by default where there is CUDA.
        policy: `adaptive` lets the text decide who drafts and how far, round by round, where the plan says what that
            costs, down to plain decoding; more rows than it knows are decoded plainly. `fixed` keeps to the plan.
        draft_memory: the most bytes, or a size such as `2G`, that the draft's own layers may take beside the model: the
            quantised copies and the trimmed head of plans that have them (`draft_bytes(model, plan)` tells how much).
        draft_model: a smaller model of the same tokenizer, on the same device, that drafts the plan's gamma tokens in
            the place of the model's own layers; the plan must not name any (`Plan(skip_set=SkipSet(), gamma=4)`). It
            takes its weights and a cache of its own (`stats.draft_bytes`).

    Raises:
        InputError: the draft takes more than `draft_memory`, and nothing was taken yet; or the draft model does not go
            with the model or the plan.
        UnsupportedModelError: the family is not among those tested, or the probe found a difference.
        PlanError: the plan is malformed, or made for another model.
    """
    options = DecodeOptions(backend=backend, compile=compile, graphs=graphs, policy=policy, draft_memory=draft_memory)
    return SelfSpeculator(model, plan, options, draft_model)


def draft_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """What the draft's own layers take beside the model, before they are made; 0 for a plan that only skips."""
    plan.check_fits(model.config)
    return draft_weight_bytes(model, plan.draft_spec) if plan.gamma else 0


class SelfSpeculator:
    """A model with a plan. `generate` takes what `model.generate` takes and returns what it returns.

    One request runs at a time; calls from other threads wait. Also usable as `model.generate(custom_generate=self)`
    with the model it wraps, but Hugging Face then drops `streamer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | str | os.PathLike[str],
        options: DecodeOptions = DecodeOptions(),
        draft_model: PreTrainedModel | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self.options = options
        self.plan = plan if isinstance(plan, Plan) else Plan.from_pretrained(plan)
        if draft_model is not None:
            check_plan(self.plan, options.draft_memory)
        self.model = model
        check_supported(model)
        self.plan.check_fits(model.config)
        self.runtime = Runtime(
            model,
            self.plan.draft_spec if self.plan.gamma else None,  # a draft that never runs needs no draft weights
            backend=options.backend,
            compile=options.compile,
            graphs=options.graphs if recorder is None else recorder,
            draft_memory=options.draft_memory_bytes,
            pass_lengths=self.plan.pass_lengths,
            measured_in=self.plan.measured_in,
        )
        self.draft_runtime: Runtime | None = None
        """Where a draft model runs, if there is one."""
        if draft_model is not None:
            self.draft_runtime = draft_runtime(self.runtime, draft_model, options)
        _warn_if_stale(self.plan, **self.runtime.conditions)
        self._warned_of_sampling = self._warned_of_rows = False
        self.stats = Stats()
        """Of the latest call that began to decode, also if it was then broken off."""
        self._lock = RequestLock()

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
        criteria = with_stop_strings(self.model, generation_config, stopping_criteria, tokenizer, kwargs)

        def run(*args: Any, **prepared: Any) -> Tensor | SpeculativeOutput:
            return self(*args, **prepared, selfspec_streamer=streamer)  # type: ignore[misc]

        result: Tensor | SpeculativeOutput = through_hugging_face(
            self.model, run, inputs, generation_config, logits_processor, criteria, kwargs
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
                    self._lock.transfer()

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
        criteria = with_stop_strings(self.model, generation_config, stopping_criteria, tokenizer, kwargs)
        request: Request | PlainDecoding = through_hugging_face(
            self.model, self._prepare, inputs, generation_config, logits_processor, criteria, kwargs
        )
        if isinstance(request, PlainDecoding):
            raise UnsupportedOptionError(f"{request.reason}, so it cannot be streamed; use generate with a streamer")
        if request.rows != 1:
            raise InputError(f"streaming serves one row, but {request.rows} were given; use generate")
        if request.keep_scores or request.keep_logits:
            raise UnsupportedOptionError("a stream yields tokens alone; for scores or logits, use generate")
        with self._lock.held(), closing(self._rounds(request)) as rounds:
            for committed in rounds:
                for row in committed:
                    yield row
                    self._lock.transfer()

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
        with self._lock.held():
            if isinstance(request, PlainDecoding):
                self.stats = Stats(rows=request.prompts.shape[0], slower_paths=[request.reason])
                return request.decode(self.stats, selfspec_streamer)
            streamed = Streamed(selfspec_streamer, request) if selfspec_streamer is not None else None
            with closing(self._rounds(request)) as rounds:
                for committed in rounds:
                    if streamed is not None:
                        streamed.put(committed)
            if streamed is not None:
                streamed.streamer.end()
            return output_of(request, generation_config, self.stats)

    def _prepare(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Request | PlainDecoding:
        """The request for what Hugging Face prepared; or, where no view can serve it, a call of its own decoding."""
        prepared = Prepared(
            model=model,
            input_ids=input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
        )
        if not self._warned_of_sampling:
            self._warned_of_sampling = True
            _warn_if_stale(self.plan, do_sample=bool(generation_config.do_sample))
        if self.options.policy == "adaptive" and self.draft_runtime is None and not self._warned_of_rows:
            self._warned_of_rows = _warn_if_too_many_rows(self.plan, input_ids.shape[0])
        return prepared.request(self.plan)

    def _rounds(self, request: Request) -> Generator[list[Committed], None, None]:
        self.runtime.refresh()
        if self.draft_runtime is not None:
            refresh(self.draft_runtime, self.runtime)
        choice = self.runtime.backend
        self.stats = Stats(
            rows=request.rows,
            backend=choice.backend.name,
            backend_reason=choice.reason,
            slower_paths=[f"plain lock-step decoding: {reason}" for reason in request.lockstep],
        )
        drafter: Drafter = NoDrafter()
        if not request.lockstep:
            drafter, self.stats.policy = drafter_for(
                self.plan, self.runtime, request.rows, self.options.policy, self.draft_runtime
            )
        self.runtime.reserve(request.rows, request.max_length + request.room)
        whole = False
        try:
            yield from decode(self.runtime, drafter, request, self.stats)
            whole = True
        finally:
            _record_paths(self.stats, self.runtime, self.draft_runtime, request)
            self.stats.changes = list(drafter.changes)
            if not whole:  # an error may have left a NaN behind, even in a slot that is masked
                self.runtime.zero_cache()
                if self.draft_runtime is not None:
                    self.draft_runtime.zero_cache()


def _warn_if_stale(plan: Plan, **here: Any) -> None:
    if (reason := plan.stale_because(**here)) is not None:
        advice = "the output stays right, another plan may be faster; run 'selfspec search' here"
        warnings.warn(f"plan was searched with {reason}: {advice}", PlanWarning, stacklevel=4)


def _warn_if_too_many_rows(plan: Plan, rows: int) -> bool:
    """Warn if the plan knows no round costs of as many rows; whether it warned."""
    if (reason := too_many_rows(plan, rows)) is None:
        return False
    advice = f"search for {rows} rows (--rows, or --more-rows), or keep to the plan with policy 'fixed'"
    warnings.warn(f"{reason}, so they are decoded plainly; {advice}", PlanWarning, stacklevel=4)
    return True


def _record_paths(stats: Stats, runtime: Runtime, draft_runtime: Runtime | None, request: Request) -> None:
    """Write to `stats` what was compiled and captured, and why the rest was not."""
    passes = runtime.passes
    stats.compiled, stats.draft_bytes = passes.compile, runtime.views.draft_weights.nbytes
    if draft_runtime is not None:
        stats.draft_bytes += draft_model_bytes(runtime.model, draft_runtime)
        if (reason := draft_runtime.passes.uncompiled_reason) not in (None, passes.uncompiled_reason):
            stats.slower_paths.append(f"the draft model runs eagerly: {reason}")
    stats.slower_paths += [f"of the draft, {line}" for line in unsupported_reasons(runtime.model, runtime.draft_spec)]
    if passes.uncompiled_reason is not None:
        stats.slower_paths.append(f"passes run eagerly: {passes.uncompiled_reason}")
    if runtime.uncaptured_reason is not None:
        stats.slower_paths.append(f"rounds are not captured: {runtime.uncaptured_reason}")
    elif runtime.graphs is not None and is_captured(runtime, request):
        stats.captured, stats.graph_bytes = True, runtime.graphs.nbytes
