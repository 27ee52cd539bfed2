"""Editing prompts: a short function, repeated with new docstrings.

The embedded model hardly copies a function that it has read once: a copy stays true for about 15 tokens. It does
continue an editing history: a short function, then a marker and the function with another docstring, several times. The
prompt is an editing history that ends with a marker.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from selfspec.demo.copying import NEW_DOCSTRING
from selfspec.demo.corpus import Definition, Source, definitions

VERSIONS = 8
"""Versions of the function with a new docstring in a prompt, after the version without docstring."""
DOCSTRINGS = (
    "See the description of {name} above.",
    "This is {name}, documented anew.",
    "Do the work of {name}.",
    "Same as before; only this line is new.",
)
"""Docstrings in turn. The embedded model knows them from its copy-and-edit documents."""
BODY = range(3, 25)
HEADER = range(25)
"""Tokens of a function's body and header. The model does not copy longer functions."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function without decorators, indentation and docstring."""

    name: str
    header: str
    body: str

    def edited(self, docstring: str) -> str:
        """The function with this docstring."""
        indent = self.body[: len(self.body) - len(self.body.lstrip())]
        return f'{self.header}\n{indent}"""{docstring.format(name=self.name)}"""\n{self.body}'

    @property
    def prompt(self) -> str:
        """The function, then `VERSIONS` times marker and edited function, and a last marker."""
        edits = [self.edited(DOCSTRINGS[version % len(DOCSTRINGS)]) for version in range(VERSIONS)]
        return f"\n\n{NEW_DOCSTRING}\n".join([f"{self.header}\n{self.body}", *edits, ""]).rstrip("\n")


def short_functions(files: Sequence[Source], tokenizer: PreTrainedTokenizerBase, random: Random) -> list[Function]:
    """All distinct short functions of some files, in random order."""
    found = {function: None for file in files for function in _functions(file)}
    short = [f for f in found if _length(f.body, tokenizer) in BODY and _length(f.header, tokenizer) in HEADER]
    random.shuffle(short)
    return short


def _functions(file: Source) -> Iterator[Function]:
    for definition in definitions(file):
        if (function := _function(definition)) is not None:
            yield function


def _function(definition: Definition) -> Function | None:
    """The function of a definition; None for classes, empty functions, and indentation that `dedent` cannot remove."""
    lines = textwrap.dedent(definition.text).splitlines()
    try:
        node = ast.parse("\n".join(lines)).body[0]
    except (SyntaxError, IndexError):  # dedent stops at a multi-line string that begins in column 0
        return None
    if not isinstance(node, ast.FunctionDef):
        return None
    documented = ast.get_docstring(node) is not None
    if documented and len(node.body) == 1:
        return None
    first = node.body[0]
    start = (first.end_lineno or first.lineno) if documented else first.lineno - 1
    header = "\n".join(lines[: first.lineno - 1])
    return Function(name=node.name, header=header, body="\n".join(lines[start:]))


def _length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
