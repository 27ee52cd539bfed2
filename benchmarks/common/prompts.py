"""Prompts: those of a file and those of the embedded model, as token ids."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from selfspec.demo import calibration_prompts, held_out_prompts
from selfspec.huggingface.loading import Loaded
from selfspec.huggingface.prompts import load_prompts


def read(path: Path, loaded: Loaded, new_tokens: int) -> list[Tensor]:
    """The prompts of a file, each of which must leave room for the new tokens."""
    return load_prompts(path, loaded.tokenizer, context=loaded.context, new_tokens=new_tokens)


def embedded(loaded: Loaded, new_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Calibration prompts and held-out prompts of the embedded model."""
    return read(calibration_prompts(), loaded, new_tokens), read(held_out_prompts(), loaded, new_tokens)
