"""The command line: `selfspec demo | search | generate | bench | profile | report`.

Nothing heavy is imported before a command runs, so that `selfspec --help` answers at once.
"""

import re
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from selfspec.cli import bench, demo, generate, profile, report, search
from selfspec.cli.options import flag, with_options
from selfspec.cli.streams import CLOSED_PIPE, safe_output
from selfspec.errors import OptionWarning, PlanWarning, SelfspecError, is_out_of_memory, printable

__all__ = ["app", "main"]


RETIRED_OPTIONS = {"--other-rows": "--more-rows"}
"""Options of earlier releases, and their names today."""
LONGEST_USAGE = 300
"""Characters of a usage error, which repeats arguments as they were given."""
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer has no public name for the base class of its usage errors."""


def _complain(text: str, code: int = 1) -> NoReturn:
    typer.echo("error: " + printable(text), err=True)
    raise typer.Exit(code) from None


class _Group(TyperGroup):
    """Prints an error of the user's input as one line on stderr; exits 1, or 2 for a usage error."""

    def main(  # type: ignore[override]  # all callers give the other arguments by name
        self, args: Any = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            code = super().main(args, standalone_mode=False, **extra)
        except _UsageError as error:
            code = _usage(error)
        except SystemExit:  # Typer and Rich end so when the reader of stdout went away
            code = CLOSED_PIPE
        except typer.Abort:
            typer.echo("error: aborted", err=True)
            code = 1
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SelfspecError as error:
            command = self.commands.get(ctx.invoked_subcommand)
            _complain(_as_typed(str(error), [parameter.name or "" for parameter in command.params] if command else []))
        except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            _complain(f"{reason}; memory does not suffice: try fewer --rows, a smaller --dtype or a smaller --memory")


def _usage(error: Any) -> int:
    """Print a usage error, or the help where nothing was asked for; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    message = printable(error.format_message()).rstrip(".")
    message = message if len(message) <= LONGEST_USAGE else message[: LONGEST_USAGE - 3] + "..."
    command = error.ctx.command_path if error.ctx is not None else "selfspec"
    typer.echo(f"error: {message[:1].lower()}{message[1:]}; see '{command} --help'", err=True)
    return int(error.exit_code)


def _as_typed(message: str, parameters: list[str]) -> str:
    """The message with the names of settings as typed on the command line: `draft_memory` as `--draft-memory`."""
    names = "|".join(name for name in parameters if "_" in name)
    return re.sub(rf"(?<![\w/.'-])(?:{names})(?![\w/.'-])", lambda name: flag(name[0]), message) if names else message


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
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with 'selfspec demo'. Every command answers to --help.",
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
    search finds what to skip and writes a plan; generate decodes by it; bench
    measures it against the plain model and its rivals.
    """


def main() -> None:
    """The `selfspec` console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # advice of the libraries beneath, to programmers
        for category in (PlanWarning, OptionWarning):
            warnings.simplefilter("default", category)
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {printable(message)}", err=True)
    with safe_output():
        app()
