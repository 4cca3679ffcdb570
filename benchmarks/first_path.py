"""Speed and memory of calibrate, greedy and the pruned cache, each against a rival in the same run.

    python benchmarks/first_path.py [--context 4096] [--repeats 5] [-f json]

Prints one row a measurement: what, ours, the rival or the goal, and their ratio (below 1 is better, for all rows).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from runtime import counted_bytes
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt import Calibration, SubsetProblem, calibrate, load_bundle, load_model, mask_from_solutions, solve_many
from grace_opt.models.texts import read_pieces, token_windows

HEADS = Path(__file__).parent.parent / "tests" / "data" / "heads-qwen2.5-coder-1.5b.safetensors"


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def row(what: str, ours: float, rival: str, theirs: float, unit: str) -> dict[str, Any]:
    return {"what": what, "ours": ours, "rival": rival, "theirs": theirs, "unit": unit, "ratio": ours / theirs}


def paired(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of two measurements taken in turn, so that a machine that slows down slows both."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def real_heads(count: int, ratio: float) -> list[SubsetProblem]:
    """Real n = 128 heads, each copy with its channels in another order."""
    rng = np.random.default_rng(0)
    graphs = [head.weights for head in load_bundle(HEADS).heads]
    orders = [rng.permutation(128) for _ in range(count)]
    return [
        SubsetProblem(graphs[i % len(graphs)][np.ix_(order, order)], int(ratio * 128), name=f"head {i}")
        for i, order in enumerate(orders)
    ]


def greedy_row(problems: list[SubsetProblem], goal: float, repeats: int) -> dict[str, Any]:
    solve_many(problems, "greedy")
    ours = statistics.median(seconds(lambda: solve_many(problems, "greedy")) for _ in range(repeats))
    return row(f"greedy, {len(problems)} heads, n = {problems[0].n}", 1e3 * ours, "goal", goal, "ms")


def main(
    model_name: Annotated[str, typer.Option("--model")] = "smollm2-135m",
    context: int = 4096,
    new_tokens: int = 64,
    repeats: int = 5,
    format: Annotated[str, typer.Option("-f", "--format")] = "table",
) -> None:
    """Measure and print."""
    model, tokenizer = load_model(model_name)
    options = Calibration(tokens=2048, objective="logit")
    windows = list(token_windows(read_pieces(None), tokenizer, 2048, 1024))

    def plain_forward() -> None:
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            for window in windows:
                model(input_ids=torch.tensor([window]), use_cache=False)

    calibration = paired(
        lambda: seconds(lambda: calibrate(model, tokenizer, read_pieces(None), options)),
        lambda: seconds(plain_forward),
        repeats,
    )
    rows = [row("calibrate, 2048 tokens", *_with(calibration, "plain forward of the same tokens"), "s")]

    bundle = calibrate(model, tokenizer, read_pieces(None), options)
    problems = bundle.problems(0.5)
    rows.append(greedy_row(problems, 20.0, 4 * repeats))
    rows.append(greedy_row(real_heads(256, 0.6), 150.0, 4 * repeats))

    mask = mask_from_solutions(bundle, solve_many(problems, "greedy"))
    prompt = torch.tensor([next(token_windows(read_pieces(None), tokenizer, context, context))])
    pruned = grace_opt.runtime.cache(mask, model, generated="prune")
    dynamic = DynamicCache(config=model.config)
    pairs = []
    with torch.inference_mode():
        for step in range(-1, new_tokens):
            ids = prompt if step < 0 else prompt[:, step : step + 1]
            times = []
            for past in (pruned, dynamic):  # step by step in turn: the machine's speed drifts by more than the ratio
                model.set_attn_implementation("grace_opt" if past is pruned else "sdpa")
                times.append(seconds(partial(model, input_ids=ids, past_key_values=past, logits_to_keep=1)))
            pairs.append(times)
    decoding = [1e3 * statistics.mean(times) for times in zip(*pairs[1:], strict=True)]
    rows.append(row(f"decode at {context} tokens", decoding[0], "DynamicCache and SDPA", decoding[1], "ms/token"))

    tokens = context + new_tokens
    measured, counted = pruned.nbytes, counted_bytes(pruned, tokens, model.dtype.itemsize) or 0
    rows.append(row(f"cache at {tokens} tokens", measured / 1e6, "count of what must be kept", counted / 1e6, "MB"))
    full = grace_opt.runtime.cache_nbytes(dynamic)
    rows.append(row(f"cache at {tokens} tokens", measured / 1e6, "DynamicCache", full / 1e6, "MB"))

    if format == "json":
        print(json.dumps({"records": rows}))
        return
    table = Table(title=f"{model_name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ("what", "ours", "rival", "theirs", "unit", "ratio"):
        table.add_column(name, justify="left" if name in ("what", "rival", "unit") else "right")
    for entry in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else v for v in entry.values()))
    Console(width=130).print(table)


def _with(pair: tuple[float, float], rival: str) -> tuple[float, str, float]:
    return pair[0], rival, pair[1]


if __name__ == "__main__":
    typer.run(main)
