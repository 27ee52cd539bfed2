"""selfspec generate: decode by a plan, and watch it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from selfspec_search.settings import Seed

from selfspec.cli import options
from selfspec.cli.options import DraftModel, Placement, SamplingOptions, Without
from selfspec.cli.terminal import asides, load_draft_model, load_model, tell_draft_bytes
from selfspec.cli.token_view import Show, Writer, tell
from selfspec.decode_options import DecodeOptions
from selfspec.errors import InputError
from selfspec.plan.draft_spec import MOST_DRAFTED
from selfspec.utils.files import check_writable
from selfspec.utils.settings import Described

if TYPE_CHECKING:
    from selfspec.decoding.stats import Stats
    from selfspec.huggingface.prompts import Prompt
    from selfspec.plan.plan import Plan

DEFAULT_NEW_TOKENS = 256
DEMO_PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
"""What the embedded model continues where no prompt is given."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """A prompt, or a file of prompts."""

    prompt: Annotated[str | None, typer.Option(help="The prompt; by default what comes from standard input.")] = None
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one after the other: text lines or .jsonl.")
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the tokenizer's chat template.")] = False

    def read(self, model: str) -> list[Prompt]:
        """All prompts; as chats with `--chat`. Without options: standard input, or a prompt of the embedded model."""
        from selfspec.huggingface.loading import DEMO
        from selfspec.huggingface.prompts import Prompt, read_prompts

        if self.prompt is not None and self.prompt_file is not None:
            raise typer.BadParameter("give either --prompt or --prompt-file")
        if self.prompt_file is not None:
            prompts = read_prompts(self.prompt_file)
        elif self.prompt is None and sys.stdin.isatty():
            if model != DEMO:
                raise typer.BadParameter("give --prompt or --prompt-file, or pipe a prompt to standard input")
            prompts = [Prompt(text=DEMO_PROMPT)]
        else:
            text = sys.stdin.read().removesuffix("\n") if self.prompt is None else self.prompt
            if not text and self.prompt is None and model == DEMO:
                text = DEMO_PROMPT
            if not text:
                raise InputError("the prompt is empty; give --prompt some text, or pipe some to standard input")
            prompts = [Prompt(text=text)]
        return [prompt.as_chat() for prompt in prompts] if self.chat else prompts


def generate(
    model: options.Model,
    plan: options.PlanFileOrNone = None,
    lookup: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Without a plan: draft up to N tokens by prompt lookup.", min=1, max=MOST_DRAFTED
        ),
    ] = None,
    *,
    given: PromptOptions,
    max_new_tokens: Annotated[
        int | None, Described(f"By default {DEFAULT_NEW_TOKENS}, or what the context has room for.", least=1)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the text where TEXT appears; may be repeated.")
    ] = None,
    sampling: SamplingOptions,
    seed: Seed = 0,
    decoding: Annotated[DecodeOptions, Without({"graphs"})],
    drafting: DraftModel,
    show: Annotated[
        bool,
        typer.Option("--show", help="A colour for each token's origin, and in the end how often drafts were right."),
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the figures of all prompts as JSON."),
    ] = None,
    place: Placement,
) -> None:
    """Decode by a plan, or with a draft model, as it comes: drafted tokens that were accepted in green,
    the model's own plain.

    Without a plan, prompt lookup drafts where it pays, by a measurement of two seconds. Greedy unless a sampling option
    is given. The text goes to stdout, one line of figures to stderr. With --show, each token has the
    colour of its origin: its drafter, or the model (recovered, bonus).
    """
    prompts = given.read(model)
    if stats is not None:
        _check_stats_file(stats)
    chosen = _plan(plan, lookup, drafting)
    if drafting.draft_model is not None:
        from selfspec.drafters.draft_model import check_plan

        assert chosen is not None
        # Before models are loaded, and before the draft's bytes are printed.
        check_plan(chosen, decoding.draft_memory, "without --plan, --draft-gamma sets the draft length")
    loaded = load_model(model, place)
    draft_model = load_draft_model(drafting.draft_model, loaded)

    import torch

    from selfspec.huggingface.prompts import check_length, encode_prompts
    from selfspec.speculator import SelfSpeculator

    if chosen is not None:
        tell_draft_bytes(loaded.model, chosen)
    spec = SelfSpeculator(loaded.model, chosen, decoding, draft_model)
    if chosen is None:
        asides().print(
            f"no plan was given, so passes were timed: {spec.plan}; 'selfspec search {model}' may find sub-layers to "
            "skip or quantise",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
    encoded = encode_prompts(prompts, loaded.tokenizer, vocabulary=loaded.vocabulary)
    for one, tokens in zip(prompts, encoded, strict=True):
        check_length(len(tokens), one.source, context=loaded.context, new_tokens=max_new_tokens or 1)
    torch.manual_seed(seed)
    stops = {"stop_strings": stop} if stop else {}
    shown = Show(spec.plan, "layers" if draft_model is None else "draft model") if show else None
    writer = Writer(spec, loaded.tokenizer, shown)
    for tokens in encoded:
        limit = max_new_tokens or DEFAULT_NEW_TOKENS
        if loaded.context is not None:
            limit = min(limit, loaded.context - len(tokens))
        writer.write(tokens, max_new_tokens=limit, **stops, **sampling.arguments)
        if writer.interrupted:
            break
    if shown is not None:
        tell(shown.summary(writer.stats, asides()))
    if stats is not None:
        _write_stats(writer.stats, stats)
    if writer.interrupted:
        raise typer.Exit(130)


def _plan(file: Path | None, lookup: int | None, drafting: DraftModel) -> Plan | None:
    """The plan of the file, or of the options; None without any of them."""
    from selfspec.plan.lookup import PromptLookup
    from selfspec.plan.plan import Plan
    from selfspec.plan.sublayers import SkipSet

    if drafting.draft_gamma is not None and (file is not None or drafting.draft_model is None):
        raise InputError("--draft-gamma goes with --draft-model where no plan is given; a plan has a gamma of its own")
    if lookup is not None and (file is not None or drafting.draft_model is not None):
        raise InputError("--lookup goes without --plan and --draft-model; a plan has settings of its own for lookup")
    if file is not None:
        return Plan.from_pretrained(file)
    if lookup is not None:
        return Plan(skip_set=SkipSet(), gamma=0, prompt_lookup=PromptLookup(gamma=lookup))
    return Plan(skip_set=SkipSet(), gamma=drafting.gamma) if drafting.draft_model is not None else None


def _check_stats_file(path: Path) -> None:
    """Raise `InputError` before decoding if the file cannot be written."""
    if str(path) == "-" or path.parent == Path("/dev"):
        raise InputError(f"--stats is '{path}', but stdout is for the text, and stderr for asides; name a file")
    check_writable(path)


def _write_stats(stats: Stats, path: Path) -> None:
    """Write the figures as JSON, atomically."""
    from selfspec.utils.files import write_atomically

    write_atomically(path, stats.to_json(indent=2) + "\n")
