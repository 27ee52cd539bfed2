from __future__ import annotations

import pytest
from saved import byte_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from selfspec.cli.token_view import Detokenizer

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("text", ["plain", "naïve", "日本語と🙂🙃", "  two  spaces \n\n\ttabs", "🙂" * 9, ""])
def test_the_pieces_add_up_to_the_text_and_no_character_is_split(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER("é: ")["input_ids"])
    pieces = [detokenizer.put(token) for token in TOKENIZER(text)["input_ids"]]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.end() == ""


def test_bytes_that_never_become_a_character_are_shown_in_the_end_at_the_latest() -> None:
    broken = TOKENIZER("a🙂b")["input_ids"]
    del broken[2]  # of the four bytes of the face
    detokenizer = Detokenizer(TOKENIZER, [])
    pieces = [detokenizer.put(token) for token in broken]
    assert "".join(pieces) + detokenizer.end() == TOKENIZER.decode(broken)
    detokenizer = Detokenizer(TOKENIZER, [])
    assert [detokenizer.put(token) for token in broken[:3]] == ["a", "", ""]
    assert detokenizer.end() == TOKENIZER.decode(broken[:3]).removeprefix("a")


def test_special_tokens_are_not_shown() -> None:
    detokenizer = Detokenizer(TOKENIZER, [])
    stop = TOKENIZER.eos_token_id
    tokens = [*TOKENIZER("ab")["input_ids"], stop, *TOKENIZER("c")["input_ids"], stop]
    assert [detokenizer.put(token) for token in tokens] == ["a", "b", "", "c", ""]
    assert detokenizer.end() == ""


def test_spaces_that_a_decoder_strips_at_the_start_are_kept_within_a_text() -> None:
    words = Tokenizer(WordLevel({"▁one": 0, "▁two": 1, "s": 2, "?": 3}, unk_token="?"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([0, 1]) == "one two"
    detokenizer = Detokenizer(tokenizer, [0])
    assert [detokenizer.put(token) for token in (1, 2, 0, 1)] == [" two", "s", " one", " two"]
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.put(token) for token in (1, 2, 0)] == ["two", "s", " one"]
