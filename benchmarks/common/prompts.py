"""Prompts of a file or of the embedded model, as token ids; and texts that a model writes after prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfspec_search.replay.texts import Text, write_texts
from torch import Tensor

from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.huggingface.loading import Loaded
from selfspec.huggingface.prompts import load_prompts
from selfspec.runtime.runtime import Runtime


def read(path: Path, loaded: Loaded, new_tokens: int) -> list[Tensor]:
    """The prompts of a file, `t` each. Each prompt must leave room for the new tokens."""
    return load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens)


def embedded(loaded: Loaded, new_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Calibration prompts and held-out prompts of the embedded model."""
    return read(calibration_prompts(), loaded, new_tokens), read(held_out_prompts(), loaded, new_tokens)


def texts_of(runtime: Runtime, prompts: Sequence[Tensor], new_tokens: int) -> list[Text]:
    """The model's greedy texts, in the order of the prompts."""
    written = dict(write_texts(runtime, prompts, new_tokens))
    return [written[index] for index in range(len(prompts))]
