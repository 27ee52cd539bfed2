"""Prose prompts: first halves of long docstrings, cut within a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from selfspec.demo.corpus import Source

TOKENS = range(60, 500)
"""Tokens of a prompt."""
LINES = 10
"""Lines: the shortest docstring."""
WORDS = 5
"""Words: a line with as many or more words, and no code, is prose."""
PROSE_LINES = 0.7
"""The least share of prose among a docstring's non-blank lines."""
PER_FILE = 3
_CODE = (">>>", "...", "def ", "class ", "import ", "%", "-")


def prose_prompts(files: Sequence[Source], tokenizer: PreTrainedTokenizerBase, random: Random) -> list[str]:
    """First halves of docstrings, at most `PER_FILE` of each file, in random order."""
    found = []
    for file in files:
        halves = [half for half in _halves(file) if len(tokenizer.encode(half, verbose=False)) in TOKENS]
        random.shuffle(halves)
        found += halves[:PER_FILE]
    random.shuffle(found)
    return found


def _halves(file: Source) -> Iterator[str]:
    lines = file.text.splitlines()
    for node in ast.walk(ast.parse(file.text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or ast.get_docstring(node) is None:
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        docstring = lines[first:last]
        if len(docstring) >= LINES and _is_prose(docstring):
            yield _cut(docstring)


def _cut(docstring: Sequence[str]) -> str:
    """The first half, up to the middle of its last wordy line, so that the model continues a sentence."""
    half = docstring[: len(docstring) // 2]
    last = max((at for at, line in enumerate(half) if len(line.split()) >= WORDS), default=0)
    words = half[last].split()
    indent = half[last][: len(half[last]) - len(half[last].lstrip())]
    return "\n".join([*half[:last], indent + " ".join(words[: (len(words) + 1) // 2])])


def _is_prose(lines: Sequence[str]) -> bool:
    filled = [line for line in lines if line.strip()]
    wordy = [line for line in filled if len(line.split()) >= WORDS and not line.lstrip().startswith(_CODE)]
    return len(wordy) >= PROSE_LINES * len(filled)
