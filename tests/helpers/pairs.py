"""A model and our object around it, run side by side."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import torch
from models import ENDS_SKIPPED, VOCABULARY, damped_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from selfspec import Plan, SelfSpeculator, Stats, wrap


@cache
def llama() -> PreTrainedModel:
    """One model for all tests that leave it as it was."""
    return damped_model("llama", ENDS_SKIPPED)


@cache
def speculator(gamma: int = 3, exit_threshold: float | None = None) -> SelfSpeculator:
    """Around the shared model, with this plan."""
    return wrap(llama(), Plan(skip_set=ENDS_SKIPPED, gamma=gamma, exit_threshold=exit_threshold))


def assert_same(*args: Any, spec: SelfSpeculator | None = None, fresh: Any = None, **kwargs: Any) -> Stats:
    """Both return the same tokens, padding included. `fresh` makes keyword arguments that a call uses up."""
    spec = spec or speculator()
    theirs = spec.model.generate(*args, **kwargs, **(fresh() if fresh else {}))
    ours = spec.generate(*args, **kwargs, **(fresh() if fresh else {}))
    assert torch.equal(ours, theirs), f"ours: {ours.tolist()}, theirs: {theirs.tolist()}"
    return spec.stats


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable string a token: letters, then pairs of letters."""
    letters = string.ascii_letters
    words = [*letters, *(a + b for a in letters[:4] for b in letters)][: VOCABULARY - 1]
    backend = Tokenizer(BPE({"<pad>": 0, **{word: i for i, word in enumerate(words, start=1)}}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def text(tokens: Tensor) -> str:
    decoded: str = tokenizer().decode(tokens, skip_special_tokens=False)
    return decoded
