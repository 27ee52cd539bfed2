"""The corpus: the sources of the running Python's standard library, split by file, and the tokenizer made from them."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 1024
HELD_OUT_FILES = 40
SMALLEST_HELD_OUT_FILE = 3000  # bytes: a held-out file must be long enough to cut prompts from
SKIPPED_FOLDERS = frozenset(
    ["__pycache__", "encodings", "idlelib", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test", "tests"]
)  # tests, other people's packages and generated tables


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its path below the standard library, and its text."""

    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on, and what is never trained on."""

    train: tuple[Source, ...]
    held_out: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A function or class: its whole lines, indentation kept, without a final newline."""

    text: str
    file: Source
    first_line: int  # both count from 1, as in ast
    last_line: int


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library and hold out the 40 large enough files whose paths have the smallest SHA-256."""
    sources = list(_sources(root or Path(sysconfig.get_paths()["stdlib"])))
    candidates = [s for s in sources if len(s.text) >= SMALLEST_HELD_OUT_FILE]
    held_out = sorted(candidates, key=_path_hash)[:HELD_OUT_FILES]
    paths = {s.path for s in held_out}
    return Corpus(train=tuple(s for s in sources if s.path not in paths), held_out=tuple(held_out))


def _sources(root: Path) -> Iterator[Source]:
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(path.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Source(path=path.as_posix(), text=text)


def _path_hash(source: Source) -> str:
    return hashlib.sha256(source.path.encode()).hexdigest()


def definitions(source: Source) -> list[Definition]:
    """All functions and classes of a file whose body does not start on the header's line."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:
        return []
    lines = source.text.splitlines()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.end_lineno is None or node.body[0].lineno == node.lineno:
            continue
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        found.append(Definition(text=text, file=source, first_line=node.lineno, last_line=node.end_lineno))
    return found


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose decode(encode(text)) is the text, whatever the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=CONTEXT,
    )
