"""SpeculativeOutput: the result of `generate` if the call asks for an output object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from selfspec.decoding.request import Request
from selfspec.decoding.stats import Stats


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output without a cache, and `stats`. Scores and logits after a row's own end are zeros."""

    stats: Stats | None = None


def output_of(request: Request, config: GenerationConfig, stats: Stats) -> Tensor | SpeculativeOutput:
    """The tokens `b length` of a finished request, or an output object if the config asks for one."""
    sequences = request.result()
    if not config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=request.result_steps(request.scores) if request.keep_scores else None,  # type: ignore[arg-type]
        logits=request.result_steps(request.logits) if request.keep_logits else None,  # type: ignore[arg-type]
        stats=stats,
    )
