"""Sources: the Python files of this machine as one stream of tokens, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from midsize_model.size import Size
from selfspec.demo import model_dir
from selfspec.demo.copying import copy_document
from selfspec.demo.corpus import CONTEXT, Corpus, Source, definitions, load_corpus

COPIED_SHARE = 0.15
"""Share of copy-and-edit documents in the text, so that the model learns to repeat a function."""
CHARACTERS_PER_FILE = 200_000
"""Characters: the longest file. Longer files are mostly tables."""
AT_ONCE = 1000
"""Documents: tokenized together."""


def gather(size: Size, seed: int) -> Corpus:
    """Training files of all roots in random order, up to `megabytes`; and the held-out files of all roots."""
    corpora = [load_corpus(root) for root in size.roots]
    train = [source for corpus in corpora for source in corpus.train if len(source.text) <= CHARACTERS_PER_FILE]
    Random(seed).shuffle(train)
    return Corpus(
        train=tuple(_first(train, size.megabytes)),
        held_out=tuple(source for corpus in corpora for source in corpus.held_out),
    )


def _first(sources: Sequence[Source], megabytes: float) -> Iterator[Source]:
    room = megabytes * 1e6
    for source in sources:
        room -= len(source.text)
        if room < 0:
            return
        yield source


def train_tokenizer(corpus: Corpus, size: Size) -> PreTrainedTokenizerBase:
    """A tokenizer like the embedded model's, trained on the corpus."""
    texts = [source.text for source in _first(corpus.train, size.tokenizer_megabytes)]
    kind: Any = AutoTokenizer.from_pretrained(model_dir())
    tokenizer: PreTrainedTokenizerBase = kind.train_new_from_iterator(texts, size.vocabulary, show_progress=False)
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def documents(corpus: Corpus, seed: int) -> Iterator[str]:
    """The training files, mixed with copy-and-edit documents of their definitions."""
    random, owed = Random(seed), 0.0
    for source in corpus.train:
        yield source.text
        owed += COPIED_SHARE * len(source.text)
        if owed > len(source.text):  # parse few files, since parsing is slow
            for definition in definitions(source):
                text = copy_document(definition.text, random)
                if len(text) <= owed:
                    owed -= len(text)
                    yield text


class Stream:
    """All documents as one row of tokens on the device, each with an end of text. Steps draw random windows."""

    def __init__(
        self, texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, device: torch.device, seed: int
    ) -> None:
        self.seed = seed
        pieces = [np.array(tokens, dtype=np.int32) for tokens in _encoded(texts, tokenizer)]
        self.tokens = torch.from_numpy(np.concatenate(pieces)).to(device)

    def batch(self, step: int, *, rows: int, length: int) -> Tensor:  # b t+1
        """The windows of a step, which depend on seed, step and size only."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.tokens) - length - 1, (rows, 1), generator=random)
        return self.tokens[(starts + torch.arange(length + 1)).to(self.tokens.device)].long()


def _encoded(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while batch := [text for _, text in zip(range(AT_ONCE), texts, strict=False)]:
        for tokens in tokenizer(batch, verbose=False)["input_ids"]:
            yield [*tokens, tokenizer.eos_token_id]
