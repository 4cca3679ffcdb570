"""The table of commands, and what becomes of their failures: bad input is one sentence and exit code 2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import grace_opt
from grace_opt.cli import keys
from grace_opt.cli.calibrate import calibrate
from grace_opt.cli.compare import compare
from grace_opt.cli.demo import demo
from grace_opt.cli.evaluate import evaluate
from grace_opt.cli.export import export
from grace_opt.cli.fetch import fetch
from grace_opt.cli.generate import generate
from grace_opt.cli.methods import methods
from grace_opt.cli.options import grouped
from grace_opt.cli.output import say
from grace_opt.cli.serve import serve
from grace_opt.cli.solve import solve
from grace_opt.cli.solvers import solvers
from grace_opt.cli.status import status
from grace_opt.cli.submit import submit
from grace_opt.cli.targets import targets
from grace_opt.cli.worker import worker
from grace_opt.errors import InputError

HELP = "Choose which channels of a key/value cache to drop, prove how good the choice is, and apply it."

#: In the order in which --help lists them.
COMMANDS: list[Callable[..., None]] = [
    calibrate,
    solve,
    compare,
    generate,
    evaluate,
    export,
    methods,
    solvers,
    targets,
    demo,
    serve,
    worker,
    submit,
    status,
    fetch,
]


def _print_version(asked: bool) -> None:
    if asked:
        print(grace_opt.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """The options that go before a command."""


app = typer.Typer(
    name="grace-opt",
    help=HELP,
    callback=_root,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(grouped(command))
group = typer.Typer(name="keys", help="Make, list and remove the API keys of a service.", rich_markup_mode=None)
group.command("add")(grouped(keys.add))
group.command("list")(grouped(keys.show))
group.command("remove")(grouped(keys.remove))
app.add_typer(group)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 2 for bad input, 1 for what is not expected, each with a sentence.

    Raises KeyboardInterrupt where the command was interrupted.
    """
    debug = "--debug" in arguments
    if not debug:
        # Other libraries' remarks are not for our users; errors reach them as exceptions.
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    line = [argument for argument in arguments if argument != "--debug"]  # it may stand anywhere
    try:
        code = app(line or ["--help"], prog_name="grace-opt", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from None
        if hasattr(error, "format_message"):  # a usage error, of the command line parser
            return _failed(error.format_message(), 2, debug=False)
        if isinstance(error, InputError | OSError | MemoryError):
            return _failed(str(error) or "out of memory", 2, debug)
        return _failed(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1, debug)
    if code == 130:  # Typer's word for an interrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came of an interrupt: libraries make other errors of one that meets them in an import."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        from rich.console import Console

        Console(stderr=True).print_exception()
    say(f"error: {' '.join(message.split())}")
    return code
