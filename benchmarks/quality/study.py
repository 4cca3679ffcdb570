"""What the studies share: options, the evaluation of a list of trials, and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from grace_opt.compression.budget import Budget
from grace_opt.compression.method import method
from grace_opt.evaluate.documents import Passages, read_documents
from grace_opt.evaluate.kl import evaluate, prompts
from grace_opt.evaluate.trial import Trial
from grace_opt.models.load import load_model

Record = dict[str, Any]
TEXTS = Path("~/.cache/grace-opt/texts").expanduser()

ModelOption = Annotated[str, typer.Option("--model", help="As in grace-opt evaluate.")]
TextOption = Annotated[Path, typer.Option("--text", help="Documents; benchmarks/texts.py makes them.")]
DocumentsOption = Annotated[int, typer.Option("--documents", help="Documents at the most.")]
PrefixOption = Annotated[int, typer.Option("--prefix", help="Tokens of each prompt.")]
ScoredOption = Annotated[int, typer.Option("--scored", help="Tokens scored after it.")]
FormatOption = Annotated[str, typer.Option("-f", "--format", help="table, markdown or json.")]


def named(label: str, of: str, ratio: float, value_ratio: float = 0.0, **overrides: Any) -> Trial:
    """Method ``of`` with some fields set, under a label of its own."""
    return Trial(label, method(of, overrides), Budget(ratio, value_ratio))


def load(model: str, text: Path, documents: int, prefix: int, scored: int, skip: int = 0) -> tuple[Any, Any, Passages]:
    """The model, its tokenizer and passages of the documents after the first ``skip`` long enough ones."""
    loaded, tokenizer = load_model(model)
    chosen = prompts(loaded, tokenizer, read_documents(text), prefix, scored, skip + documents)
    return loaded, tokenizer, Passages(chosen.ids[skip:], chosen.names[skip:], prefix, scored, chosen.too_short)


def measure(model: Any, chosen: Passages, trials: Sequence[Trial]) -> list[Record]:
    """The records of `evaluate`, with a line on stderr for every tenth of the way."""
    console = Console(stderr=True)

    def progress(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            console.print(f"{done} of {total} caches scored")

    return evaluate(model, chosen, trials, progress=progress)


def shown(interval: Mapping[str, float | None]) -> str:
    """A mean and its interval, short."""
    if interval["low"] is None:
        return f"{interval['mean']:.4f}"
    return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def by_method(records: Sequence[Record]) -> list[Record]:
    """A row a method, a column a budget: the KL with its interval."""
    rows: dict[str, Record] = {}
    for record in records:
        ratio = f"{record['ratio']:g}" + (f" / {record['value_ratio']:g}" if record["value_ratio"] else "")
        budget = f"{record['budget_bytes']:.0f} B" if record["budget_bytes"] else ratio
        rows.setdefault(record["method"], {"method": record["method"]})[budget] = shown(record["kl"])
    return list(rows.values())


def show(title: str, rows: Sequence[Record], format: str) -> None:
    """Print rows as a table, as Markdown, or as JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if format == "json":
        sys.stdout.write(json.dumps({"title": title, "rows": rows}) + "\n")
    elif format == "markdown":
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")
    else:
        table = Table(*columns, title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*(_cell(row.get(name)) for name in columns))
        Console(width=160).print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
