"""The command line: `selfspec demo | search | generate | bench | profile | report`.

Nothing heavy is imported before a command runs, so that `selfspec --help` answers at once.
"""

import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from selfspec.cli import bench, demo, generate, profile, report, search
from selfspec.cli.options import with_options
from selfspec.errors import OptionWarning, PlanWarning, SelfspecError, is_out_of_memory

__all__ = ["app", "main"]


RETIRED_OPTIONS = {"--other-rows": "--more-rows"}
"""Options of earlier releases, and their names today."""


def _complain(text: str) -> NoReturn:
    typer.echo("error: " + " ".join(text.split()), err=True)
    raise typer.Exit(1) from None


class _Group(TyperGroup):
    """Prints an error of the user's input as one line on stderr, and exits 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SelfspecError as error:
            _complain(str(error))
        except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
            if not is_out_of_memory(error):
                raise
            _complain(f"{error}; memory does not suffice: try fewer --rows, a smaller --dtype or a smaller --memory")


class _Command(TyperCommand):
    """Also reads options under their retired names, with a warning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_current_name(arg) for arg in args])


def _current_name(arg: str) -> str:
    name, equals, value = arg.partition("=")
    if name not in RETIRED_OPTIONS:
        return arg
    typer.echo(f"warning: {name} is now called {RETIRED_OPTIONS[name]}; use the new name", err=True)
    return RETIRED_OPTIONS[name] + equals + value


app = typer.Typer(
    name="selfspec",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]selfspec demo[/bold]. Every command answers to --help.",
)


def _flowing(text: str) -> str:
    """Paragraphs without the line breaks of the source code, so that the terminal wraps the text."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _command in (demo.demo, search.search, generate.generate, bench.bench, profile.profile, report.report):
    app.command(cls=_Command, help=_flowing(_command.__doc__ or ""))(with_options(_command))


def _print_version(asked: bool) -> None:
    if asked:
        from selfspec import __version__

        typer.echo(f"selfspec {__version__}")
        raise typer.Exit


@app.callback()
def _selfspec(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Self-speculative decoding by layer skipping.

    A model drafts with a part of its own sub-layers and checks the draft in one full pass: the same output, sooner.
    [bold]search[/bold] finds what to skip and writes a plan; [bold]generate[/bold] decodes by it; [bold]bench[/bold]
    measures it against the plain model and its rivals.
    """


def main() -> None:
    """The `selfspec` console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # advice of the libraries beneath, to programmers
        for category in (PlanWarning, OptionWarning):
            warnings.simplefilter("default", category)
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {message}", err=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    app()
