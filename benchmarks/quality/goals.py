"""The methods side by side: keys at four ratios, keys and values at bytes, needles, and KL over generated position.

    python benchmarks/quality/goals.py [--documents 12] [--part keys --part values ...] [-f markdown]

About half an hour on two cores for all parts with 12 documents.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from study import (
    TEXTS,
    DocumentsOption,
    FormatOption,
    ModelOption,
    PrefixOption,
    Record,
    ScoredOption,
    TextOption,
    by_method,
    load,
    measure,
    named,
    show,
    shown,
)

from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, Windows
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.documents import Passages
from grace_opt.evaluate.run import Plan, run
from grace_opt.evaluate.trial import Trial
from grace_opt.graphs.objectives import KEY_OBJECTIVES

NAMES = ("think", "grace", "grace-opt")
PARTS = ("keys", "values", "generated", "needle", "positions", "cost")


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 12,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    part: Annotated[list[str] | None, typer.Option(help="Of keys, values, generated, needle, positions, cost.")] = None,
    format: FormatOption = "table",
) -> None:
    """Measure and print."""
    loaded, tokenizer, chosen = load(model, text, documents, prefix, scored)
    for name in part or PARTS:
        if name == "keys":
            trials = [named(each, each, ratio) for ratio in (0.5, 0.6, 0.7, 0.8) for each in NAMES]
            trials += [named(each, each, ratio) for ratio in (0.5, 0.7) for each in ("streaming", "svd", "kq-svd")]
            records = measure(loaded, chosen, trials)
            show(f"Keys: KL a token, nats, {documents} documents", by_method(records), format)
            show("Against think at the same ratio", [_against(record, records) for record in records], format)
        elif name == "values":
            full = _full_bytes(loaded, chosen)
            trials = [
                Trial("grace-opt", METHODS["grace-opt"], Budget(bytes_per_token=share * full))
                for share in (0.5, 0.4, 0.3)
            ]
            trials += [
                named("think, keys only", "think", 0.5),
                named("think", "think", 0.6, 0.4),
                named("think", "think", 0.6, 0.6),
            ]
            show("Keys and values", [_bytes_row(record) for record in measure(loaded, chosen, trials)], format)
        elif name == "generated":
            trials = [named(each, each, ratio) for ratio in (0.5, 0.7) for each in NAMES]
            trials += [
                named("grace-opt, 128 queries", "grace-opt", ratio, observation_window=128) for ratio in (0.5, 0.7)
            ]
            records = measure(loaded, chosen, [replace(trial, generated="prune") for trial in trials])
            show("Keys, scored tokens pruned as they leave the window", by_method(records), format)
        elif name == "needle":
            trials = [named(each, each, ratio) for ratio in (0.5, 0.7) for each in (*NAMES, "streaming")]
            rows = [
                {name: r[name] for name in ("method", "ratio", "protocol")} | {"needles found": shown(r["score"])}
                for r in run(loaded, tokenizer, trials, Plan(("needle",), (4096,), 5))
            ]
            show("Needles in 4096 tokens", rows, format)
        elif name == "positions":
            _, _, long = load(model, text, 2, prefix, 8192 - prefix)
            records = measure(loaded, long, [named(each, each, 0.7) for each in NAMES])
            rows = [
                {"method": r["method"], **{f"{b['from']}": f"{b['mean']:.4f}" for b in r["kl_positions"]}}
                for r in records
            ]
            show(f"KL over generated position, ratio 0.7, {len(long.ids)} documents, by first position", rows, format)
        elif name == "cost":
            show("Selection, seconds", _cost(loaded, chosen), format)
        else:
            raise typer.BadParameter(f"no part {name!r}; parts: {', '.join(PARTS)}")


def _against(record: Record, records: list[Record]) -> Record:
    think = next(r for r in records if r["method"] == "think" and r["ratio"] == record["ratio"])
    apart = record["kl"]["high"] < think["kl"]["low"] if record["kl"]["low"] is not None else None
    return {
        "method": record["method"],
        "ratio": record["ratio"],
        "think's KL over it": think["kl"]["mean"] / record["kl"]["mean"],
        "intervals apart": "-" if record is think else "yes" if apart else "no",
        "p": record["against_first"],
        "NLL rise": record["nll"]["mean"],
        "top-1 %": 100 * record["top1"],
        "bytes/token": round(record["bytes_per_token"]),
    }


def _bytes_row(record: Record) -> Record:
    return {
        "method": record["method"],
        "pruned keys / values": f"{record['ratio']:g} / {record['value_ratio']:g}"
        if not record["budget_bytes"]
        else "shared",
        "% of bytes held": 100 * record["bytes_per_token"] / record["full_bytes_per_token"],
        "% for an old token": 100 * (record["budget_bytes"] or float("nan")) / record["full_bytes_per_token"],
        "KL": shown(record["kl"]),
    }


def _full_bytes(model: Any, chosen: Passages) -> float:
    captured = capture(model, chosen.ids[0][:64], 63, 1)
    return sum(2 * captured.past.layers[i].keys[0, :, 0].nbytes for i in captured.queries)


def _cost(model: Any, chosen: Passages) -> list[Record]:
    """Selection of all layers beside the prefill of the same prompt, and objectives beside `logit`."""
    rows: list[Record] = []
    for ids in chosen.ids[:3]:
        captured = capture(model, ids, chosen.prefix, 32)
        row: Record = {"prefill": captured.seconds}
        with torch.inference_mode():
            for name in ("think", "grace", "grace-opt"):
                method = METHODS[name]
                captured._observed.clear()
                began = time.perf_counter()
                apply(method, captured.observed(32, method.windows, method.selection.spans), Budget(0.6))
                row[name] = time.perf_counter() - began
            for name, spans in (("logit", None), ("centered", None), ("attention", 2), ("attention", None)):
                captured._observed.clear()
                layers = captured.observed(32, Windows(), spans)
                began = time.perf_counter()
                for seen in layers.values():
                    KEY_OBJECTIVES[name](seen)
                row[f"graphs: {name}" + (f", {spans} spans" if spans else "")] = time.perf_counter() - began
        rows.append(row | {"grace-opt / prefill": row["grace-opt"] / row["prefill"]})
    return rows


if __name__ == "__main__":
    typer.run(main)
