"""Copy-and-edit documents: a definition, a marker comment that announces what comes, and almost the same code again."""

import ast
import builtins
import keyword
import re
import textwrap
from random import Random

ONCE_MORE = "# The same code, once more:"
NEW_DOCSTRING = "# The same code, with a new docstring:"
RENAMED = "# The same code, with {old} renamed to {new}:"

_DOCSTRINGS = (
    "Do the work of {name}.",
    "This is {name}, documented anew.",
    "See the description of {name} above.",
    "Same as before; only this line is new.",
    "A copy of {name} with a shorter docstring.",
)
_NEW_NAMES = ("value", "item", "data", "result", "thing", "other", "source", "current", "entry", "number")
_RESERVED = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "cls"}


def copy_prompt(text: str, random: Random) -> tuple[str, str]:
    """The definition followed by a marker, and the copy that should follow it (both without a final newline)."""
    indent = text[: len(text) - len(text.lstrip())]
    edit = random.choice((_once_more, _with_new_docstring, _with_name_changed))
    marker, copy = edit(text, random)
    return f"{text}\n\n{indent}{marker}", copy


def copy_document(text: str, random: Random) -> str:
    """A training document: definition, marker, copy."""
    prompt, copy = copy_prompt(text, random)
    return f"{prompt}\n{copy}\n"


def _once_more(text: str, random: Random) -> tuple[str, str]:
    return ONCE_MORE, text


def _with_new_docstring(text: str, random: Random) -> tuple[str, str]:
    node = _parse(text)
    if node is None:
        return _once_more(text, random)
    lines = text.splitlines()
    first = node.body[0]
    body_indent = lines[first.lineno - 1][: len(lines[first.lineno - 1]) - len(lines[first.lineno - 1].lstrip())]
    docstring = f'{body_indent}"""{random.choice(_DOCSTRINGS).format(name=node.name)}"""'
    old_end = (first.end_lineno or first.lineno) if ast.get_docstring(node) is not None else first.lineno - 1
    if old_end == len(lines):
        return _once_more(text, random)
    return NEW_DOCSTRING, "\n".join([*lines[: first.lineno - 1], docstring, *lines[old_end:]])


def _with_name_changed(text: str, random: Random) -> tuple[str, str]:
    node = _parse(text)
    names = _local_names(node) if node is not None else []
    if not names:
        return _once_more(text, random)
    old = random.choice(names)
    stem = random.choice(_NEW_NAMES)
    new = stem if not re.search(rf"\b{stem}\b", text) else f"{stem}_{old}"
    return RENAMED.format(old=old, new=new), re.sub(rf"\b{re.escape(old)}\b", new, text)


def _local_names(node: ast.AST) -> list[str]:
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    names += [n.arg for n in ast.walk(node) if isinstance(n, ast.arg)]
    return sorted({n for n in names if len(n) > 1 and names.count(n) > 1 and n not in _RESERVED})


def _parse(text: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    try:
        node = ast.parse(textwrap.dedent(text)).body[0]
    except (SyntaxError, IndexError):  # dedent stops at a multi-line string that begins in column 0
        return None
    return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else None
