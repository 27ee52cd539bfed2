"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

PolicyName = Literal["adaptive", "fixed"]
DRAFT_GAMMA = 4

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face hub id, a local directory, or 'demo' (the embedded model)."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is CUDA where there is any.")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16; auto is the checkpoint's own (for 'demo': float32).")
]
_plan = typer.Option("--plan", metavar="PLAN", help="A plan file that 'search' wrote, or a directory that holds one.")
PlanFile = Annotated[Path, _plan]
PlanFileOrNone = Annotated[Path | None, _plan]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model", metavar="MODEL", help="A smaller model of the same tokenizer that drafts, named like MODEL."
    ),
]
DraftGamma = Annotated[
    int | None, typer.Option(help=f"Tokens that the draft model drafts a round; {DRAFT_GAMMA} by default.", min=1)
]
_prompts = typer.Option(
    "--prompts", metavar="FILE", help="Prompts: text, one a line; or .jsonl with 'prompt' or chat 'messages'."
)
PromptFile = Annotated[Path, _prompts]
PromptFileOrNone = Annotated[Path | None, _prompts]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Fuse passes: slower to start, faster to run; by default on CUDA."),
]
Policy = Annotated[
    PolicyName, typer.Option(help="Whether who drafts, and how far, follows the text, or stays as the plan says.")
]
DraftMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="The most that a draft's own layers may take beside the model, such as 512M or 4G."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(help="Attention backend: flash-attn, torch-flash or sdpa; by default the best that serves."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)]
NewTokens = Annotated[int, typer.Option(help="Tokens to write after each prompt.")]
Trials = Annotated[int, typer.Option(help="Drafts to try in the study, by all its workers together.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")]
