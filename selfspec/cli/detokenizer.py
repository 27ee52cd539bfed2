"""Detokenizer: text from tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""How many of the prompt's tokens are decoded along, so that the first new one gets its space, or does not."""


class Detokenizer:
    """Turns tokens into text one by one; what it returns adds up to the text of all.

    A token may hold part of a character's bytes, or a space only where something stands before it. So new text is
    what a short stretch of tokens decodes to, less what it did without the new ones, once no character is in pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._shown = len(self._tokens)

    def put(self, token: int) -> str:
        """The text that `token` completes; often one word, and nothing within a character."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return new

    def end(self) -> str:
        """What was held back: bytes that never became a character."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
