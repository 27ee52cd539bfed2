"""Batches: which tokens each step sees. A pure function of seed, length and step, so both recipes see the same ones."""

from functools import lru_cache
from random import Random

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from selfspec.demo.copying import copy_document
from selfspec.demo.corpus import Source, definitions

COPY_EVERY = 6  # one row in six holds copy-and-edit documents
MARKER_ROOM = 40  # tokens: marker, new docstring or longer name, end of text


class Batches:
    """Rows of `length + 1` tokens: mostly windows of the shuffled files, every sixth of copy-and-edit documents."""

    def __init__(self, files: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.documents = [np.array(tokens, dtype=np.int64) for tokens in _encode(tokenizer, [f.text for f in files])]
        self.definitions = [d.text for file in files for d in definitions(file)]
        self.sizes = np.array([len(tokens) for tokens in _encode(tokenizer, self.definitions)])
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)
        self._pool = lru_cache(maxsize=4)(self._copyable)

    def batch(self, step: int, *, rows: int, length: int) -> torch.Tensor:  # b t+1
        """The rows of one step; input and labels are its first and its last `length` tokens."""
        numbers = range(step * rows, (step + 1) * rows)
        return torch.from_numpy(np.stack([self._row(number, length) for number in numbers]))

    @property
    def tokens(self) -> int:
        """Tokens in the files, one epoch without copy-and-edit documents."""
        return sum(len(d) + 1 for d in self.documents)

    def _row(self, number: int, length: int) -> np.ndarray:
        if number % COPY_EVERY == COPY_EVERY - 1:
            return self._copy_row(number, length)
        windows = self.tokens // length - 2
        epoch, window = divmod(number - number // COPY_EVERY, windows)
        stream, order = self._epoch(epoch, length)
        start = order[window] * length
        return stream[start : start + length + 1]

    def _shuffled_epoch(self, epoch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, epoch, length])
        end = np.array([self.tokenizer.eos_token_id])
        pieces = [piece for i in random.permutation(len(self.documents)) for piece in (self.documents[i], end)]
        stream = np.concatenate(pieces)[random.integers(length) :]
        return stream, random.permutation(self.tokens // length - 2)

    def _copy_row(self, number: int, length: int) -> np.ndarray:
        random = Random(f"{self.seed} {number} {length}")
        pool, weights = self._pool(length)
        row: list[int] = []
        while len(row) <= length:
            text = copy_document(self.definitions[random.choices(pool, cum_weights=weights)[0]], random)
            row += [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]
        return np.array(row[: length + 1], dtype=np.int64)

    def _copyable(self, length: int) -> tuple[list[int], list[int]]:
        """Definitions that fit twice into a row, the longer the likelier: short ones teach little copying."""
        fits = np.flatnonzero((2 * self.sizes + MARKER_ROOM <= length) & (self.sizes > 20))
        return fits.tolist(), np.cumsum(self.sizes[fits]).tolist()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return ids
