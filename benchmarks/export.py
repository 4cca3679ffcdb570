"""Exports beside rivals, in one run: what a stored cache takes, what it loses, and how fast it is made and read.

    python benchmarks/export.py [--model smollm2-135m] [--prefix 2048] [--prompts 2] [--text FILE] [-f json]

A row a way to store the cache of a prompt: bytes beside those of the 16-bit cache; KL of stock attention over what was
loaded, on the tokens after the prompt; GB of the 16-bit cache that a core encodes and decodes in a second of its time,
the best of ``--repeats`` (with a read-out of the prompt, encoding fits it too). Rivals: the tensors as torch saves
them, the same after zlib, and integers alone in the layout of KIVI (arXiv 2402.02750). Masks come from Python's
documentation, prompts from other prose.
"""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from grace_opt import (
    METHODS,
    Budget,
    Calibration,
    GraphBundle,
    KVMask,
    calibrate,
    load_model,
    mask_from_solutions,
    problems_of,
    registry,
    solve_many,
)
from grace_opt.compression.codec import Whole
from grace_opt.compression.integers import as_integers
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.documents import Document, passages, read_documents
from grace_opt.evaluate.kl import divergence
from grace_opt.evaluate.replay import log_probabilities
from grace_opt.export.store import KVStore
from grace_opt.export.store.store import dynamic_cache
from grace_opt.heads import KINDS
from grace_opt.models.texts import prose, read_pieces

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
WINDOW = 32
OURS = [(0.7, 0.5, 4, 3), (0.7, 0.6, 4, 3), (0.6, 0.5, 4, 4)]  # pruned keys and values, bits of keys and values


@dataclass(frozen=True)
class Way:
    """A way to store a cache: bytes of it, and keys and values from bytes. ``fits``: it looks at what a prompt saw."""

    name: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Pairs]
    fits: bool = False


def torch_saved(squeeze: bool) -> Way:
    """Keys and values by torch.save, whole, and by zlib at its fastest on top."""

    def encode(kv: Any) -> bytes:
        file = io.BytesIO()
        torch.save([(keys.bfloat16(), values.bfloat16()) for keys, values in pairs_of(kv)], file)
        return zlib.compress(file.getvalue(), 1) if squeeze else file.getvalue()

    def decode(data: bytes) -> Pairs:
        pairs: Pairs = torch.load(io.BytesIO(zlib.decompress(data) if squeeze else data), weights_only=True)
        return pairs

    return Way("torch.save" + (" and zlib 1" if squeeze else ""), encode, decode)


def stored(name: str, mask: KVMask, layers: int) -> Way:
    """By our store; what is whole takes 16 bits."""
    store = KVStore(mask, layers)
    return Way(name, lambda kv: store.encode(kv, "bfloat16"), store.decode, store.queries > 0)


def masks(bundle: GraphBundle, layers: int) -> list[Way]:
    """Integers alone, and our masks."""
    method, heads = METHODS["grace-opt"], bundle.geometry()[1]
    windows = replace(method.windows, recent_window=WINDOW)
    ways = []
    for bits in (4, 3, 2):
        codecs: Any = {kind: [as_integers(Whole(), bits, kind)] * heads for kind in KINDS}
        plan = CachePlan({i: LayerPlan(i, codecs, windows) for i in range(layers)})
        mask = KVMask("integers", heads, bundle.integer("head_dim", 0), plan, num_hidden_layers=layers)
        ways.append(stored(f"integers of {bits} bits", mask, layers))
    solver = registry.create("greedy")
    for ratio, value_ratio, key_bits, value_bits in OURS:
        chosen = replace(method, key_bits=key_bits, value_bits=value_bits)
        solutions = solve_many(problems_of(bundle, chosen, Budget(ratio, value_ratio)), solver)
        for scope in ("prefill", "static"):
            mask = mask_from_solutions(bundle, solutions, chosen, readout_scope=scope, recent_window=WINDOW)
            name = f"{ratio:g} and {value_ratio:g} pruned, {key_bits} and {value_bits} bits, {scope} read-out"
            ways.append(stored(name, mask, layers))
    return ways


def pairs_of(kv: Captured | Pairs) -> Pairs:
    """Keys and values of each layer."""
    return [(each.keys, each.values) for each in kv.past.layers] if isinstance(kv, Captured) else kv


def best(function: Callable[[], Any], repeats: int) -> float:
    """Seconds of this process's own time."""
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times[1:])


def measure(captured: Sequence[Captured], plain: Sequence[torch.Tensor], way: Way, repeats: int) -> dict[str, Any]:
    """A row."""
    kl, taken, full = [], 0, 0
    for prompt, expected in zip(captured, plain, strict=True):
        data = way.encode(prompt)
        taken += len(data)
        full += sum(2 * each.numel() for pair in pairs_of(prompt) for each in pair)
        dtype = prompt.past.layers[0].keys.dtype
        past = dynamic_cache(((k.to(dtype), v.to(dtype)) for k, v in way.decode(data)), prompt.ids.device)
        kl.append(float(divergence(prompt, expected, log_probabilities(prompt, past))[0].mean()))
    first = captured[0]
    given: Any = first if way.fits else [(k.bfloat16(), v.bfloat16()) for k, v in pairs_of(first)]
    data = way.encode(given)
    gigabytes = full / len(captured) / 1e9
    return {
        "stored": way.name,
        "share": taken / full,
        "times smaller": full / taken,
        "KL": sum(kl) / len(kl),
        "KL of each": kl,
        "encode GB/s": gigabytes / best(lambda: way.encode(given), repeats),
        "decode GB/s": gigabytes / best(lambda: way.decode(data), repeats),
    }


def main(
    model_name: Annotated[str, typer.Option("--model")] = "smollm2-135m",
    prefix: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 2048,
    scored: Annotated[int, typer.Option(help="Tokens after it that are compared.")] = 256,
    prompts: Annotated[int, typer.Option(help="Prompts.")] = 2,
    text: Annotated[str | None, typer.Option(help="As of grace-opt evaluate; prose of Python's library.")] = None,
    tokens: Annotated[int, typer.Option(help="That the masks are calibrated on.")] = 8192,
    repeats: int = 5,
    format: Annotated[str, typer.Option("--format", "-f", help="table, markdown or json")] = "table",
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(model_name)
    texts = [Document("prose", "".join(prose()), cut=True)] if text is None else read_documents(text)
    chosen = passages(texts, tokenizer, prefix, scored, prompts)
    options = Calibration(tokens=tokens, value_objective="output", recent_window=WINDOW)
    bundle = calibrate(model, tokenizer, read_pieces(None), options, model_name=model_name)
    captured = [capture(model, ids, prefix, 32) for ids in chosen.ids]
    plain = [torch.cat(list(log_probabilities(each, dense(each)))) for each in captured]
    layers = model.config.get_text_config().num_hidden_layers
    ways = [torch_saved(False), torch_saved(True), *masks(bundle, layers)]
    rows = [measure(captured, plain, way, repeats) for way in ways]
    about = {"model": model_name, "prefix": prefix, "prompts": len(captured), "load": os.getloadavg()[0]}
    show(rows, about, format)


def show(rows: list[dict[str, Any]], about: dict[str, Any], format: str) -> None:
    """Print the rows; ``load`` is of the machine in the last minute."""
    if format == "json":
        print(json.dumps({**about, "records": rows}))
        return
    columns = [name for name in rows[0] if name != "KL of each"]
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else row[name] for name in columns] for row in rows]
    if format == "markdown":
        print("\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells]))
        return
    table = Table(title=", ".join(f"{name} {value}" for name, value in about.items()))
    for name in columns:
        table.add_column(name)
    for line in cells:
        table.add_row(*line)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
