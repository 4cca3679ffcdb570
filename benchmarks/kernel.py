"""The decode kernel: time, bytes and bandwidth of one decoded token, against dense SDPA in the same run.

    python benchmarks/kernel.py [--batch 16] [--context 32768] [--ratio 0.5 --ratio 0.6] [-f json]
    python benchmarks/kernel.py --device cpu [--context 8192] [--dtype float32] [-f json]

On a CPU it prints a row for each shape of a layer (`cpu_kernel`); on a card one for each way of storing the cache, in
bfloat16 (`card`, which has the goals too). Kept widths are rounded to multiples of 8 channels.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import card
import cpu_kernel
import torch
import typer
from rich.console import Console
from rich.table import Table


def main(
    device: str = "cuda",
    batch: int = 16,
    context: Annotated[int | None, typer.Option(help="32768 on a card, 8192 on a CPU if not given")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="share of channels that is pruned")] = None,
    dtype: Annotated[str, typer.Option(help="on a CPU")] = "float32",
    format: Annotated[str, typer.Option("-f", "--format")] = "table",
) -> None:
    """Measure and print."""
    if device == "cpu":
        context = context or 8192
        found = cpu_kernel.records(context, getattr(torch, dtype))
        show(found, list(found[0]), f"CPU, {torch.get_num_threads()} threads, {context} tokens, {dtype}", format)
        return
    if why := card.refusal():
        typer.echo(why, err=True)
        raise typer.Exit(2)
    name, bandwidth = torch.cuda.get_device_properties(0).name, card.copy_bandwidth()
    ways = [
        (kept, values, bits)
        for kept in (max(8, round((1 - share) * 128 / 8) * 8) for share in ratio or [0.5, 0.6])
        for values in (128, kept)
        for bits in (0, 4)
    ]
    with torch.inference_mode():
        rows = list(card.records([batch], context or 32768, ways, bandwidth))
    title = (
        f"{name}, copies at {bandwidth / 1e9:.0f} GB/s, {batch} x 8 KV heads of 4 queries, {context or 32768} tokens"
    )
    show(rows, list(rows[1]), title, format)


def show(rows: list[dict[str, Any]], names: list[str], title: str, format: str) -> None:
    """Print the rows, as a table or as JSON."""
    if format == "json":
        print(json.dumps({"records": rows}))
        return
    table = Table(title=f"{title}, torch {torch.__version__}")
    for name in names:
        table.add_column(name, justify="left" if name == "what" else "right")
    for entry in rows:
        values = [entry.get(name) for name in names]
        table.add_row(*("" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in values))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
