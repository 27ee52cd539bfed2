"""selfspec generate: decode by a plan, and watch it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfspec.cli import options
from selfspec.cli.show import Show, tell
from selfspec.cli.terminal import asides, at_least, check_writable, load_draft_model, load_model, tell_draft_bytes
from selfspec.cli.writer import Writer
from selfspec.errors import InputError

if TYPE_CHECKING:
    from selfspec.decoding.stats import Stats
    from selfspec.huggingface.prompts import Prompt
    from selfspec.plan import Plan

DEFAULT_NEW_TOKENS = 256


def generate(
    model: options.Model,
    plan: options.PlanFileOrNone = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one after the other: text lines or .jsonl.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"By default {DEFAULT_NEW_TOKENS}, or what the context has room for.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    seed: options.Seed = 0,
    compile: options.Compile = None,
    backend: options.Backend = None,
    policy: options.Policy = "adaptive",
    draft_memory: options.DraftMemory = None,
    draft_model: options.DraftModel = None,
    draft_gamma: options.DraftGamma = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="A colour for each token's origin, and in the end how often drafts were right."),
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the figures of all prompts as JSON."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Decode by a plan, or with a draft model, as it comes: drafted tokens that were accepted in [green]green[/green],
    the model's own plain.

    Greedy unless a sampling option is given. The text goes to stdout, one line of figures to stderr. With
    [bold]--show[/bold] tokens are told apart by who drafted them, or what the model wrote them for.
    """
    prompts = _prompts(prompt, prompt_file, chat=chat)
    if stats is not None:
        _check_stats_file(stats)
    if max_new_tokens is not None:
        at_least("--max-new-tokens", max_new_tokens, 1)
    sampling = sampling_options(temperature, top_p, top_k)

    chosen = _plan(plan, draft_model, draft_gamma)
    if draft_model is not None:
        from selfspec.drafters.draft_model import check_plan

        check_plan(chosen, draft_memory)  # before models are loaded, and before it is told what the draft takes
    loaded = load_model(model, device=device, dtype=dtype)
    drafting = load_draft_model(draft_model, loaded)

    import torch

    from selfspec.huggingface.prompts import check_length, encode_prompts
    from selfspec.speculator import SelfSpeculator

    tell_draft_bytes(loaded.model, chosen)
    spec = SelfSpeculator(
        loaded.model,
        chosen,
        backend=backend,
        compile=compile,
        policy=policy,
        draft_memory=draft_memory,
        draft_model=drafting,
    )
    encoded = encode_prompts(prompts, loaded.tokenizer)
    for one, tokens in zip(prompts, encoded, strict=True):
        check_length(len(tokens), one.source, context=loaded.context, new_tokens=max_new_tokens or 1)
    torch.manual_seed(seed)
    shown = Show(chosen, "layers" if drafting is None else "draft model") if show else None
    writer = Writer(spec, loaded.tokenizer, shown)
    for tokens in encoded:
        limit = max_new_tokens or DEFAULT_NEW_TOKENS
        if loaded.context is not None:
            limit = min(limit, loaded.context - len(tokens))
        writer.write(tokens, max_new_tokens=limit, **sampling)
        if writer.interrupted:
            break
    if shown is not None:
        tell(shown.summary(writer.stats, asides()))
    if stats is not None:
        _write_stats(writer.stats, stats)
    if writer.interrupted:
        raise typer.Exit(130)


def _plan(file: Path | None, draft_model: str | None, draft_gamma: int | None) -> Plan:
    """The plan of the file; or, with a draft model alone, one by which that drafts."""
    from selfspec.plan import Plan
    from selfspec.plan.sublayers import SkipSet

    if draft_gamma is not None and (file is not None or draft_model is None):
        raise InputError("--draft-gamma goes with --draft-model where no plan is given; a plan has a gamma of its own")
    if file is not None:
        return Plan.from_pretrained(file)
    if draft_model is None:
        raise typer.BadParameter("give --plan, or --draft-model")
    return Plan(skip_set=SkipSet(), gamma=draft_gamma or options.DRAFT_GAMMA)


def sampling_options(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """`generate`'s keyword arguments for these options; what is not given is left to the model's own config."""
    if temperature is not None:
        at_least("--temperature", temperature, 0)
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p is {top_p}, but it must be above 0 and at most 1")
    if top_k is not None:
        at_least("--top-k", top_k, 1)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if temperature == 0 or all(value is None for value in given.values()):
        return {"do_sample": False}
    return {"do_sample": True} | {name: value for name, value in given.items() if value is not None}


def _prompts(text: str | None, file: Path | None, *, chat: bool) -> list[Prompt]:
    from selfspec.huggingface.prompts import Prompt, read_prompts

    if (text is None) == (file is None):
        raise typer.BadParameter("give either --prompt or --prompt-file")
    if file is not None:
        prompts = read_prompts(file)
    elif text:
        prompts = [Prompt(text=text)]
    else:
        raise InputError("the prompt is empty; give --prompt some text")
    return [prompt.as_chat() for prompt in prompts] if chat else prompts


def _check_stats_file(path: Path) -> None:
    """Find out before anything is decoded whether the file can be written."""
    if str(path) == "-" or path.parent == Path("/dev"):
        raise InputError(f"--stats is '{path}', but stdout is for the text, and stderr for asides; name a file")
    check_writable(path)


def _write_stats(stats: Stats, path: Path) -> None:
    """Write the figures as JSON; whoever reads the file never sees half of it."""
    from selfspec.utils.files import write_atomically

    write_atomically(path, stats.to_json(indent=2) + "\n")
