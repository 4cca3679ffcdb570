"""Bytes and milliseconds of caches on a real model and real text, side by side in one run.

    python benchmarks/runtime.py --model smollm2-135m --context 8192 [--batch 1] [--ratio 0.5 --ratio 0.7] [-f json]

One row a cache and ratio, for each context and batch; the plain cache (`dynamic`) first. The caches decode in turn,
token by token, so that a machine that slows down slows them all; the same tokens are fed to each.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from caches import think_cache
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_optimum_quanto_available

import grace_opt.runtime
from grace_opt import Calibration, InputError, KVMask, calibrate, load_model, mask_from_solutions, solve_many
from grace_opt.compression.channels import Channels
from grace_opt.models.config import text_config
from grace_opt.models.texts import read_pieces, token_windows
from grace_opt.runtime.layer import PrunedLayer
from grace_opt.runtime.ragged import RaggedLayer

WARM_UP = 3  # decoded tokens that are not timed


@dataclass(frozen=True)
class Row:
    """A cache to measure: its name, what it prunes, how a new one is made, and the attention function it runs with."""

    cache: str
    ratio: float
    value_ratio: float
    make: Callable[[], Any]
    attention: str = "grace_opt"


def rows_of(
    model: Any, mask_of: Callable[..., KVMask], ratios: list[float], values: list[float], length: int
) -> list[Row]:
    """All caches that are compared, the plain one first."""
    config = text_config(model.config)
    first = ratios[0]
    rows = [
        Row("dynamic", 0, 0, lambda: DynamicCache(config=config), "sdpa"),
        Row("static", 0, 0, lambda: StaticCache(config=config, max_cache_len=length), "sdpa"),
        Row("think, inflated", first, 0, lambda: think_cache(mask_of(first), config), "sdpa"),
    ]
    if is_optimum_quanto_available():
        rows.append(
            Row("quantized, 4 bits", 0, 0, lambda: QuantizedCache(backend="quanto", config=config, nbits=4), "sdpa")
        )
    else:
        print("no row for transformers' QuantizedCache: optimum-quanto is not installed", file=sys.stderr)
    cache = partial(grace_opt.runtime.cache, model=model, generated="prune")
    online = partial(grace_opt.runtime.online_cache, model, generated="prune")
    rows += [Row("pruned", r, 0, lambda r=r: cache(mask_of(r))) for r in ratios]
    rows += [Row("pruned", v, v, lambda v=v: cache(mask_of(v, v))) for v in values]
    rows += [
        Row("pruned, no read-out", first, 0, lambda: cache(mask_of(first, readout_scope="none"))),
        Row("pruned, static", first, 0, lambda: cache(mask_of(first), max_length=length)),
        Row("pruned, 4 bits", first, first, lambda: cache(mask_of(first, first), key_bits=4, value_bits=4)),
        Row("pruned, chosen from the prompt", first, first, lambda: online(ratio=first, value_ratio=first)),
    ]
    return rows


def masks(model: Any, tokenizer: Any) -> Callable[..., KVMask]:
    """Masks of the model by ratios: uniform, greedy, with a read-out fitted to the prompt."""
    options = Calibration(tokens=2048, value_objective="output")
    bundle = calibrate(model, tokenizer, read_pieces(None), options)
    made: dict[Any, KVMask] = {}

    def mask_of(ratio: float, value_ratio: float = 0.0, readout_scope: str = "prefill") -> KVMask:
        key = (ratio, value_ratio, readout_scope)
        if key not in made:
            part = replace(bundle, heads=tuple(head for head in bundle.heads if value_ratio or head.kind == "key"))
            solutions = solve_many(part.problems(ratio, value_ratio=value_ratio), "greedy")
            made[key] = mask_from_solutions(part, solutions, readout_scope=readout_scope)
        return made[key]

    return mask_of


def counted_bytes(past: Any, tokens: int, element: int) -> int | None:
    """What must be held for the tokens of a cache: rows of all, residuals of the whole ones and of the spare ones that
    a crop makes whole, the order of the channels, read-outs.

    Of a preallocated cache, all that it has room for; None where packed integers round up, or for a rival.
    """
    total = 0
    for layer in past.layers:
        for part in layer.parts if isinstance(layer, RaggedLayer) else [layer]:
            if isinstance(part, PrunedLayer):
                if any(side.codec.block for side in part.sides):
                    return None
                whole = part.sink_count + min(tokens, part.recent_window + part.spare)
                room = part.columns if part.is_static else tokens
                total += 8 * part.batch
                for side in part.sides:
                    codec, rows = side.codec, part.batch * side.whole.shape[1]
                    total += element * rows * (room * codec.width + whole * codec.residual_width)
                    if isinstance(codec, Channels):
                        readout = codec.residual_width * (codec.width + 1) * (codec.matrix is not None)
                        total += element * rows * readout + 8 * codec.order.numel()
            elif type(part).__name__.startswith(("Dynamic", "Static")):  # transformers' own, sliding windows too
                batch, heads, room, width = part.keys.shape
                total += element * batch * heads * room * (width + part.values.shape[3])
            else:
                return None
    return total


def held_bytes(past: Any) -> int:
    """Bytes of every tensor that a cache holds, those inside quantised tensors too."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            for name in inner:
                visit(getattr(value, name))
            if not inner and value.numel():
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)

    for layer in past.layers:
        for value in layer.tensors() if hasattr(layer, "tensors") else vars(layer).values():
            visit(value)
    return sum(found.values())


@contextmanager
def peak_of(device: torch.device) -> Iterator[dict[str, int]]:
    """The most bytes that torch holds at a time within the block, beside what it held before: under "bytes"."""
    result = {"bytes": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    now = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            result["bytes"] = max(result["bytes"], now)


def timed(model: Any, device: torch.device, **inputs: Any) -> float:
    """Seconds of one forward pass."""
    began = time.perf_counter()
    model(**inputs, logits_to_keep=1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(model: Any, rows: list[Row], ids: torch.Tensor, new_tokens: int) -> list[dict[str, Any]]:
    """Records of all rows for prompts int64[B, context + new_tokens]."""
    context, device = ids.shape[1] - new_tokens - WARM_UP, model.device
    records, pasts = [], []
    for row in rows:
        gc.collect()
        past = row.make()
        model.set_attn_implementation(row.attention)
        with peak_of(device) as peak:
            ttft = timed(model, device, input_ids=ids[:, :context], past_key_values=past)
            timed(model, device, input_ids=ids[:, context : context + 1], past_key_values=past)
        pasts.append(past)
        records.append(
            {
                "cache": row.cache,
                "ratio": row.ratio,
                "value_ratio": row.value_ratio,
                "context": context,
                "batch": len(ids),
                "ttft_s": ttft,
                "peak_bytes": peak["bytes"],
            }
        )
    times: list[list[float]] = [[] for _ in rows]
    for at in range(context + 1, ids.shape[1]):
        for row, past, each in zip(rows, pasts, times, strict=True):
            model.set_attn_implementation(row.attention)
            each.append(timed(model, device, input_ids=ids[:, at : at + 1], past_key_values=past))
    for record, past, each in zip(records, pasts, times, strict=True):
        decoded = each[WARM_UP - 1 :]
        dense = times[0][WARM_UP - 1 :]
        record["tpot_s"] = statistics.median(decoded)
        record["tpot_ratio"] = statistics.median(a / b for a, b in zip(decoded, dense, strict=True))
        record["cache_bytes"] = held_bytes(past)
        record["counted_bytes"] = counted_bytes(past, ids.shape[1], model.dtype.itemsize)
        record["largest_batch"] = None
    return records


def largest_batch(model: Any, row: Row, ids: torch.Tensor, context: int) -> int:
    """The largest batch, by doubling and then by bisection, whose prompt and a decoded token fit the device."""

    def fits(batch: int) -> bool:
        past = None
        try:
            past = row.make()
            model.set_attn_implementation(row.attention)
            for low in range(0, context, 2048):  # chunks: a cache is what should fill the memory
                model(
                    input_ids=ids[:1, low : min(low + 2048, context)].repeat(batch, 1),
                    past_key_values=past,
                    logits_to_keep=1,
                )
            model(input_ids=ids[:1, :1].repeat(batch, 1), past_key_values=past)
        except torch.OutOfMemoryError:
            return False
        finally:
            del past
            gc.collect()
            torch.cuda.empty_cache()
        return True

    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(
    model_name: Annotated[str, typer.Option("--model")] = "smollm2-135m",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of the prompt; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at a time; repeatable.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Of key channels to prune; repeatable.")] = None,
    value_ratio: Annotated[list[float] | None, typer.Option(help="Of key and value channels; repeatable.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Decoded tokens that are timed.")] = 24,
    find_largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="On a card: what fits its memory.")
    ] = False,
    device: str = "cpu",
    dtype: str = "float32",
    format: Annotated[str, typer.Option("-f", "--format")] = "table",
) -> None:
    """Measure and print."""
    try:
        if find_largest_batch and not device.startswith("cuda"):
            raise InputError("the largest batch is found by filling a card's memory; give --device cuda")
        if new_tokens < 1 or min(context or [1]) < 1 or min(batch or [1]) < 1:
            raise InputError("--context, --batch and --new-tokens must be at least 1")
        model, tokenizer = load_model(model_name, dtype=dtype, device=device)
        records = run(
            model,
            tokenizer,
            context or [8192],
            batch or [1],
            ratio or [0.5, 0.6, 0.7, 0.8],
            [0.6] if value_ratio is None else value_ratio,
            new_tokens,
            find_largest_batch,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    if format == "json":
        print(json.dumps({"records": records}))
        return
    table = Table(
        title=f"{model_name}, {dtype} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in records[0]:
        table.add_column(name, justify="left" if name == "cache" else "right")
    for record in records:
        table.add_row(*(cell(name, value) for name, value in record.items()))
    Console(width=150).print(table)


def run(
    model: Any,
    tokenizer: Any,
    contexts: list[int],
    batches: list[int],
    ratios: list[float],
    values: list[float],
    new_tokens: int,
    find_largest_batch: bool = False,
) -> list[dict[str, Any]]:
    """Records for every context and batch."""
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if longest and max(contexts) > longest:
        raise InputError(
            f"prompts of {max(contexts)} tokens do not fit the model's context of {longest}; give a smaller one"
        )
    mask_of = masks(model, tokenizer)
    records = []
    with torch.inference_mode():
        for context in contexts:
            for batch in batches:
                length = context + new_tokens + WARM_UP
                pieces = list(token_windows(read_pieces(None), tokenizer, length * batch, length))
                if len(pieces) < batch or len(pieces[-1]) < length:
                    raise InputError(
                        f"the text has no {batch} prompts of {length} tokens; give a smaller context or batch"
                    )
                ids = torch.tensor(pieces, device=model.device)
                rows = rows_of(model, mask_of, ratios, values, length)
                model(input_ids=ids[:, :64])  # what is only done once
                block = measure(model, rows, ids, new_tokens)
                if find_largest_batch:
                    for row, record in zip(rows, block, strict=True):
                        record["largest_batch"] = largest_batch(model, row, ids, context)
                records += block
    return records


def cell(name: str, value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3f}" if name.endswith(("_s", "tpot_ratio")) else str(value)


if __name__ == "__main__":
    typer.run(main)
