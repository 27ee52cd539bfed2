"""The prompts: cut from held-out files, those for calibration and those for confirmation from different files."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from selfspec.demo.copying import copy_prompt
from selfspec.demo.corpus import Corpus, Definition, Source, definitions

CALIBRATION, HELD_OUT = 64, 32
SHORTEST, LONGEST = 60, 250  # tokens
LEFT_TO_WRITE = 100  # tokens: a copy prompt leaves at least this much to repeat
PER_FILE = 6


def write_prompts(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
    """Write calibration.jsonl (64 prompts, from two thirds of the held-out files) and held_out.jsonl (32)."""
    folder.mkdir(parents=True, exist_ok=True)
    split = len(corpus.held_out) * 2 // 3
    for name, files, count in (
        ("calibration.jsonl", corpus.held_out[:split], CALIBRATION),
        ("held_out.jsonl", corpus.held_out[split:], HELD_OUT),
    ):
        prompts = make_prompts(files, tokenizer, count, Random(f"{seed} {name}"))
        (folder / name).write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")


def make_prompts(files: Sequence[Source], tokenizer: PreTrainedTokenizerBase, count: int, random: Random) -> list[str]:
    """Two thirds ordinary continuations, one third copy-and-edit, in random order, no definition used twice."""
    pool = [d for file in files for d in definitions(file)]
    random.shuffle(pool)
    copies: list[str] = []
    continuations: list[str] = []
    used: dict[str, list[Definition]] = {file.path: [] for file in files}
    for definition in pool:
        siblings = used[definition.file.path]
        if len(siblings) == PER_FILE or any(_overlap(definition, other) for other in siblings):
            continue
        if len(copies) < count // 3 and (prompt := _copying(definition, tokenizer, random)):
            copies.append(prompt)
        elif len(continuations) < count - count // 3 and (prompt := _continuation(definition, tokenizer, random)):
            continuations.append(prompt)
        else:
            continue
        siblings.append(definition)
    prompts = copies + continuations
    if len(prompts) < count:
        raise ValueError(f"the held-out files yield {len(prompts)} prompts, but {count} were asked for")
    random.shuffle(prompts)
    return prompts


def _copying(definition: Definition, tokenizer: PreTrainedTokenizerBase, random: Random) -> str | None:
    prompt, copy = copy_prompt(definition.text, random)
    fits = _fits(prompt, tokenizer) and len(tokenizer.encode(copy)) >= LEFT_TO_WRITE
    return prompt if fits else None


def _continuation(definition: Definition, tokenizer: PreTrainedTokenizerBase, random: Random) -> str | None:
    """The file's text from up to 20 lines before the definition to a line end within its body."""
    lines = definition.file.text.splitlines()
    first, last = definition.first_line, definition.last_line
    if last - first < 4:
        return None
    start = max(0, first - 1 - random.randrange(20))
    while not lines[start].strip():
        start += 1
    cut = random.randrange(first + 1, last - 1)
    if not lines[cut - 1].strip():
        cut -= 1
    prompt = "\n".join(lines[start:cut]).rstrip()
    return prompt if _fits(prompt, tokenizer) else None


def _fits(prompt: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return SHORTEST <= len(tokenizer.encode(prompt)) <= LONGEST


def _overlap(one: Definition, other: Definition) -> bool:
    return one.first_line <= other.last_line and other.first_line <= one.last_line
