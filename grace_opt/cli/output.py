"""What commands print: records on stdout, as a table or as JSON; talk on stderr."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from grace_opt.errors import shown


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


def print_records(
    records: Sequence[Mapping[str, Any]], format: Format, columns: Sequence[str] | None = None, **more: Any
) -> None:
    """Print records: all of them as one JSON object, after what is ``more``, or a table of ``columns``.

    The columns are those of the first record if left out.
    """
    if format is Format.JSON:
        from grace_opt.files import json_text

        sys.stdout.write(json_text({**more, "records": records}) + "\n")
        return
    from rich.table import Table
    from rich.text import Text

    columns = columns or list(records[0])
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name == "solver")
    for record in records:
        table.add_row(*(Text(shown(cell(record.get(name)))) for name in columns))  # a name may look like Rich's markup
    print_rich(table)


def print_rich(renderable: Any) -> None:
    """Print a table of Rich's on stdout."""
    from rich.console import Console

    # A pipe is no reason to fold tables. Without a height Rich would take 80 columns all the same where TERM is dumb.
    console = Console() if sys.stdout.isatty() else Console(width=120, height=100)
    console.print(renderable)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def say(message: str) -> None:
    """Print a sentence on stderr."""
    print("\n".join(map(shown, message.split("\n"))), file=sys.stderr)


class _Shown(logging.Formatter):
    """Log lines as a terminal may show them: they have names and errors of others in them."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))


def log_to_stderr() -> None:
    """Print what the package logs, from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Shown())
    logging.getLogger("grace_opt").addHandler(handler)


@contextmanager
def unasked() -> Iterator[None]:
    """Nobody may ask a question of the data that waits on standard input: whoever does reads its end."""
    data, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = data


@contextmanager
def remarks(what: str, quiet: bool) -> Iterator[None]:
    """Print what transformers warns of, each in a sentence, where it is not printed: it may say what was ignored."""
    from transformers.utils import logging as theirs

    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = theirs.get_logger("transformers")
    level = logger.level
    if quiet or level <= logging.WARNING:  # the user asked for silence, or hears them already
        yield
        return
    theirs.disable_default_handler()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        theirs.enable_default_handler()
    for message in dict.fromkeys(heard):
        if "LOAD REPORT" not in message:  # of weights, which are refused or known to be harmless
            say(f"transformers says {what}: {' '.join(message.split())}")


def hush_transformers(quiet: bool) -> None:
    """No loading bars where nobody watches. Imports transformers: seconds."""
    if quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
