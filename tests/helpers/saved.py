"""A tiny model on disk with a byte tokenizer, for tests of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import FIRST_DROPPED, damped_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from selfspec import Plan

STOP = "<stop>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots here') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTEXT = 97
PLAN = Plan(skip_set=FIRST_DROPPED, gamma=3)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in which every byte is a token, so that a non-ASCII character has several tokens."""
    vocabulary = {STOP: 0} | {byte: index for index, byte in enumerate(BYTES, 1)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP)
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_model(directory: Path, *, chat: bool = True, family: str = "llama", **config: Any) -> Path:
    """Save a tiny model and its tokenizer to `directory`. About half of the tokens that `PLAN` drafts are accepted."""
    settings = {"vocab_size": len(BYTES) + 1, "max_position_embeddings": CONTEXT} | config
    damped_model(family, FIRST_DROPPED, **settings).save_pretrained(directory)
    byte_tokenizer(chat=chat).save_pretrained(directory)
    return directory
