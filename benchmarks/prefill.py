"""What a compressed cache adds to a prompt: graphs, selection, read-outs and packing, as shares of the prefill itself.

    OMP_NUM_THREADS=1 python benchmarks/prefill.py [--context 1024 --context 4096] [--cache NAME] [-f json]

Two tables. One row a cache and context: what it does with the prompt of each layer, timed inside the prefill, over the
rest of the same prefill, which is the model and its attention; medians over prefills in turn. Then `attention` graphs
against `logit` graphs of the same layers: made of nothing; where the attention weights are at hand, which read-outs,
values and token policies need whatever the objective; and as `calibrate` adds up a layer with all of its moments.

With one thread, seconds are those of the CPU, which what else runs on the machine changes little.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from runtime import masks

import grace_opt.runtime
from grace_opt import InputError, load_model
from grace_opt.compression import apply as applied
from grace_opt.compression.integers import Integers
from grace_opt.compression.method import METHODS
from grace_opt.evaluate.capture import capture
from grace_opt.graphs.accumulate import GraphSums
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES
from grace_opt.graphs.observed import Observed
from grace_opt.models.texts import read_pieces, token_windows
from grace_opt.runtime.layer import PrunedLayer

seconds = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
PARTS = ("attention weights", "key graphs", "value graphs", "selection", "read-outs", "packing", "storing")


class Clock:
    """Seconds of nested parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._inside: list[float] = []  # of each part that runs, the seconds of parts inside it

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = seconds()
            try:
                return function(*args, **kwargs)
            finally:
                took = seconds() - began
                self.spent[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return run


@contextmanager
def watching(clock: Clock) -> Iterator[None]:
    """Count what the layers of a cache do with a prompt."""
    weights: Any = cached_property(clock.timed("attention weights", vars(Observed)["attention"].func))
    weights.__set_name__(Observed, "attention")
    with ExitStack() as stack:
        for part, holder, name in (
            ("storing", PrunedLayer, "begin"),
            ("selection", applied, "forward"),
            ("read-outs", applied, "_with_readout"),
            ("packing", Integers, "pack"),
        ):
            stack.enter_context(patch.object(holder, name, clock.timed(part, getattr(holder, name))))
        for part, table in (("key graphs", KEY_OBJECTIVES), ("value graphs", VALUE_OBJECTIVES)):
            stack.enter_context(patch.dict(table, {name: clock.timed(part, each) for name, each in table.items()}))
        stack.enter_context(patch.object(Observed, "attention", weights))
        yield


def caches(model: Any, tokenizer: Any, ratio: float) -> dict[str, Callable[[], Any]]:
    """Name -> a new cache."""
    mask = cache(lambda: masks(model, tokenizer)(ratio, ratio))  # calibrated where it is asked for
    made, online = grace_opt.runtime.cache, grace_opt.runtime.online_cache
    budget = {"ratio": ratio, "value_ratio": ratio}
    return {
        "mask, read-out of the prompt": lambda: made(mask(), model=model),
        "mask, read-out of the prompt, 4 bits": lambda: made(mask(), model=model, key_bits=4, value_bits=4),
        "chosen from the prompt": lambda: online(model, **budget),
        "chosen from the prompt, 4 bits": lambda: online(model, **budget, key_bits=4, value_bits=4),
    }


def shares(model: Any, new: dict[str, Callable[[], Any]], ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """A record for each cache: its parts over the rest of the prefill of int64[1, T], medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in new}
    for _ in range(rounds):
        for name, make in new.items():
            clock = Clock()
            with watching(clock), make() as past:
                began = seconds()
                model(input_ids=ids, past_key_values=past, logits_to_keep=1)
                took = seconds() - began
            total = sum(clock.spent.values())
            rest = took - total
            found[name].append({"prefill_s": rest} | {part: spent / rest for part, spent in clock.spent.items()})
            found[name][-1]["total"] = total / rest
    return [
        {"cache": name, "context": ids.shape[1]}
        | {each: statistics.median(one[each] for one in many) for each in many[0]}
        for name, many in found.items()
    ]


def graphs(model: Any, ids: list[int], rounds: int) -> list[dict[str, Any]]:
    """A record for each way to make graphs: milliseconds a layer and the ratio, the least of the rounds in turn."""
    method = METHODS["grace-opt"]
    queries, windows, spans = method.selection.observation_window, method.windows, method.selection.spans
    captured = capture(model, ids, len(ids), queries)

    def made(objective: str, layer: int, how: str) -> float:
        captured._observed.clear()
        seen = captured.observed(queries, windows, spans)[layer]
        if how != "of nothing":
            assert seen.attention is not None
        began = seconds()
        if how == "as calibrate adds them":
            GraphSums(objective).add(layer, seen)
        else:
            KEY_OBJECTIVES[objective](seen)
        return seconds() - began

    records = []
    for how in ("of nothing", "attention weights at hand", "as calibrate adds them"):
        times: dict[str, list[float]] = {}
        for objective in ("logit", "attention"):
            times[objective] = [float("inf")] * len(captured.queries)
        for _ in range(rounds):
            for at, layer in enumerate(captured.queries):
                for objective, least in times.items():
                    least[at] = min(least[at], made(objective, layer, how))
        mean = {f"{name}_ms": 1e3 * statistics.mean(least) for name, least in times.items()}
        ratio = mean["attention_ms"] / mean["logit_ms"]
        records.append({"graphs": how, "context": len(ids), **mean, "attention / logit": ratio})
    return records


def main(
    model_name: Annotated[str, typer.Option("--model")] = "smollm2-135m",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; repeatable.")] = None,
    ratio: Annotated[float, typer.Option(help="Of key and value channels to prune.")] = 0.5,
    only: Annotated[list[str] | None, typer.Option("--cache", help="One of the rows by its name; repeatable.")] = None,
    rounds: int = 7,
    format: Annotated[str, typer.Option("-f", "--format")] = "table",
) -> None:
    """Measure and print."""
    try:
        if rounds < 1 or min(context or [64]) < 64:
            raise InputError("--rounds must be at least 1, and --context at least 64")
        model, tokenizer = load_model(model_name, dtype="float32", device="cpu")
        records, ratios = [], []
        new = caches(model, tokenizer, ratio)
        for name in only or []:
            if name not in new:
                raise InputError(f"no cache {name!r}; there are {', '.join(map(repr, new))}")
        new = {name: make for name, make in new.items() if not only or name in only}
        with torch.inference_mode():
            for length in context or [1024, 4096]:
                ids = next(iter(token_windows(read_pieces(None), tokenizer, length, length)))
                model(input_ids=torch.tensor([ids[:64]]))  # what is only done once
                records += shares(model, new, torch.tensor([ids]), rounds)
                ratios += graphs(model, ids, rounds)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    if format == "json":
        print(json.dumps({"shares": records, "graphs": ratios}))
        return
    threads = f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    show(f"{model_name}, shares of the prefill, {threads}", records)
    show("attention graphs against logit graphs, milliseconds a layer", ratios)


def show(title: str, records: list[dict[str, Any]]) -> None:
    """A table of records."""
    table = Table(title=title)
    for name in records[0]:
        table.add_column(name, justify="left" if isinstance(records[0][name], str) else "right")
    for record in records:
        table.add_row(*(cell(name, value) for name, value in record.items()))
    Console(width=180).print(table)


def cell(name: str, value: Any) -> str:
    """A value as the table shows it."""
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if name in (*PARTS, "total") else f"{value:.2f}"
    return str(value)


if __name__ == "__main__":
    typer.run(main)
