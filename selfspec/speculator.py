"""wrap and SelfSpeculator: decode a model by a plan, with the conventions of Hugging Face."""

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
from selfspec.errors import InputError, PlanWarning, SelfspecError
from selfspec.huggingface.generate_call import PlainDecoding, Prepared, streamable, through_hugging_face
from selfspec.huggingface.options import with_stop_strings
from selfspec.huggingface.output import SpeculativeOutput, output_of
from selfspec.huggingface.streamer import Streamed
from selfspec.models.draft_weights import draft_weight_bytes, unsupported_reasons
from selfspec.models.support import check_supported
from selfspec.plan.plan import Plan
from selfspec.plan.sublayers import SkipSet
from selfspec.policy import drafter_for, quick_plan, too_many_rows
from selfspec.runtime.cuda_graphs import Recorder
from selfspec.runtime.runtime import Runtime
from selfspec.utils.request_lock import RequestLock

DRAFT_MODEL_GAMMA = 4
"""Tokens: the draft length of a draft model where no plan names one."""


def wrap(
    model: PreTrainedModel,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    compile: bool | None = None,
    graphs: bool | None = None,
    policy: PolicyName = "adaptive",
    draft_memory: int | str | None = None,
    draft_model: PreTrainedModel | None = None,
) -> SelfSpeculator:
    """Make `model` decode speculatively by `plan`, with the same output in less time.

    Args:
        model: a supported causal language model. The model stays unchanged and usable.
        plan: a `Plan`, a plan file, or a directory that holds one. Without a plan, prompt lookup drafts where it pays,
            by a measurement of two seconds; a plan of `selfspec search` may also skip or quantise sub-layers.
        backend: `flash-attn`, `torch-flash` or `sdpa`; by default the best attention backend that supports the model.
        compile: fuse the passes with `torch.compile`: slower to start, faster to run. The default is CUDA only: a CPU
            needs tens of seconds for every pass length.
        graphs: capture rounds as CUDA graphs; by default on CUDA.
        policy: `adaptive` decides in each round who drafts and how far, from the text and the plan's costs. Without
            costs for as many rows, rows are decoded plainly. `fixed` keeps to the plan.
        draft_memory: the most bytes, or a size such as `2G`, for the draft weights: quantised copies and a
            trimmed head (see `draft_bytes(model, plan)`).
        draft_model: a smaller model with the same tokenizer on the same device. The draft model drafts the plan's
            gamma tokens, so the plan must name no layers: `Plan(skip_set=SkipSet(), gamma=4)`. `stats.draft_bytes`
            counts the draft model's weights and cache.

    Raises:
        InputError: the draft needs more than `draft_memory`, or the draft model does not fit the model or the plan.
        UnsupportedModelError: the model's family is not supported, or the probe found a difference.
        PlanError: the plan is malformed, or belongs to another model.
    """
    options = DecodeOptions(backend=backend, compile=compile, graphs=graphs, policy=policy, draft_memory=draft_memory)
    return SelfSpeculator(model, plan, options, draft_model)


def draft_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """Bytes that the draft weights take in addition to the model, before they are made; 0 for a plan that only
    skips."""
    plan.check_fits(model.config)
    return draft_weight_bytes(model, plan.draft_spec) if plan.gamma else 0


class SelfSpeculator:
    """A model with a plan. `generate` takes what `model.generate` takes and returns what it returns.

    One request runs at a time. Calls from other threads wait; if nobody reads the stream that they wait for, they raise
    an error after a minute. `model.generate = spec.generate` works, and so does `model.generate(custom_generate=self)`,
    but Hugging Face then drops `streamer`. A copy or a pickle holds model, plan and options; it makes its own cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | str | os.PathLike[str] | None = None,
        options: DecodeOptions = DecodeOptions(),
        draft_model: PreTrainedModel | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> None:
        self.options = options
        quick = plan is None
        if plan is None:  # a draft model needs a draft length only
            plan = Plan.none() if draft_model is None else Plan(skip_set=SkipSet(), gamma=DRAFT_MODEL_GAMMA)
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
        """The runtime of the draft model, if any."""
        if draft_model is not None:
            self.draft_runtime = draft_runtime(self.runtime, draft_model, options)
        elif quick:
            self.plan = quick_plan(self.runtime)
        _warn_if_stale(self.plan, **self.runtime.conditions)
        self._warned_of_sampling = self._warned_of_rows = False
        self.stats = Stats()
        """The stats of the latest call that began to decode, even if that call was stopped early."""
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
        """Return the same as `model.generate`: `b length` tokens, or an output object if `return_dict_in_generate`.

        Greedy tokens equal those of `model.generate`. Sampled tokens have the same distribution, but other draws.

        Raises:
            UnsupportedOptionError: an option is not supported.
        """
        criteria = with_stop_strings(self.model, generation_config, stopping_criteria, tokenizer, kwargs)

        def run(*args: Any, **prepared: Any) -> Tensor | SpeculativeOutput:
            return self(*args, **prepared, selfspec_streamer=streamer)  # type: ignore[misc]

        return through_hugging_face(  # type: ignore[no-any-return]
            self.model, run, inputs, generation_config, logits_processor, criteria, kwargs
        )

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
        """Yield the tokens of one row after each round; closing the generator ends the request."""
        rounds = self.stream_rounds(
            inputs, generation_config, logits_processor, stopping_criteria, tokenizer=tokenizer, **kwargs
        )
        with closing(rounds):
            for committed in rounds:
                for token in committed.tokens:
                    with self._lock.lent():
                        yield token

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
        """Yield whole rounds where `stream` yields tokens: the round's tokens, and how many tokens were drafted."""
        criteria = with_stop_strings(self.model, generation_config, stopping_criteria, tokenizer, kwargs)
        with self._lock.held():
            request = streamable(
                through_hugging_face(
                    self.model,
                    self._prepare,
                    inputs,
                    generation_config,
                    logits_processor,
                    criteria,
                    kwargs,
                    streams=True,
                )
            )
            with closing(self._rounds(request)) as rounds:
                for committed in rounds:
                    for row in committed:
                        with self._lock.lent():
                            yield row

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
            raise InputError("custom_generate was used with another model than the model that selfspec.wrap wrapped")
        with self._lock.held():
            request = self._prepare(
                model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
            )
            if isinstance(request, PlainDecoding):
                self.stats = Stats(rows=request.prompts.shape[0], slower_paths=[request.reason])
                return request.decode(self.stats, selfspec_streamer)
            streamed = Streamed(selfspec_streamer, request) if selfspec_streamer is not None else None
            with closing(self._rounds(request)) as rounds:
                for committed in rounds:
                    if streamed is not None:
                        streamed.put(committed)
            if selfspec_streamer is not None:
                selfspec_streamer.end()
            return output_of(request, generation_config, self.stats)

    def __reduce__(self) -> tuple[Any, ...]:
        _check_apart(self)
        return SelfSpeculator, (self.model, self.plan, self.options, self.draft_runtime and self.draft_runtime.model)

    def _prepare(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Request | PlainDecoding:
        """The request for a prepared call; if no view can serve the request, Hugging Face decodes it.

        Rebuilds the views of a changed model, so the caller holds the lock.
        """
        prepared = Prepared(
            model=model,
            input_ids=input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
        )
        if (reason := self.runtime.follow()) is not None:
            return PlainDecoding(prepared, f"{reason}: model.generate decodes it")
        if not self._warned_of_sampling:
            self._warned_of_sampling = True
            _warn_if_stale(self.plan, do_sample=bool(generation_config.do_sample))
        adapts, rows = self.options.policy == "adaptive" and self.draft_runtime is None, len(input_ids)
        if adapts and not self._warned_of_rows and (reason := too_many_rows(self.plan, rows)) is not None:
            self._warned_of_rows = True
            _warn_of_rows(reason, rows)
        return prepared.request(self.plan)

    def _rounds(self, request: Request) -> Generator[list[Committed], None, None]:
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
        self.runtime.reserve(request.rows, request.first_width(static=self.runtime.static))
        try:
            yield from decode(self.runtime, drafter, request, self.stats)
        except BaseException:  # an error may leave a NaN in the cache, even in a masked slot
            for runtime in filter(None, (self.runtime, self.draft_runtime)):
                runtime.zero_cache()
            raise
        finally:
            _record_paths(self.stats, self.runtime, self.draft_runtime, request)
            self.stats.changes = list(drafter.changes)


def _warn_of_rows(reason: str, rows: int) -> None:
    advice = f"search for {rows} rows (--rows or --more-rows), or keep to the plan with policy 'fixed'"
    warnings.warn(f"{reason}, so they are decoded plainly; {advice}", PlanWarning, stacklevel=4)


def _check_apart(spec: SelfSpeculator) -> None:
    """Refuse to copy a speculator that its model refers to."""
    if getattr(vars(spec.model).get("generate"), "__self__", None) is spec:
        raise SelfspecError(
            "model.generate is the speculator's own, so neither can be copied without the other; del model.generate "
            "first, and set it again afterwards"
        )


def _warn_if_stale(plan: Plan, **here: Any) -> None:
    if (reason := plan.stale_because(**here)) is not None:
        advice = "the output stays correct, but another plan may be faster; run 'selfspec search' here"
        warnings.warn(f"plan was searched with {reason}: {advice}", PlanWarning, stacklevel=4)


def _record_paths(stats: Stats, runtime: Runtime, draft_runtime: Runtime | None, request: Request) -> None:
    """Record in `stats` which passes were compiled and captured, and why other passes were not."""
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
