"""Pruning and integers at equal bytes: quantisation alone, pruning alone, and both.

    python benchmarks/quality/integers.py [--documents 6] [--part keys --part values --part both] [-f markdown]

Bytes are those of the packed integers, scales, read-outs and channel numbers, of the whole tokens and of the keys and
values that stay whole, in a cache that holds whole numbers as float32; the bits an element are of old tokens alone.
"""

from __future__ import annotations

from typing import Annotated, Any

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
    load,
    measure,
    named,
    show,
    shown,
)

from grace_opt.evaluate.trial import Trial

KEYS = [(0.0, 8), (0.0, 4), (0.0, 3), (0.0, 2), (0.25, 4), (0.25, 3), (0.5, 4), (0.5, 3), (0.5, 2), (0.7, 4), (0.7, 3)]
BOTH = [
    *((0.0, 0.0, 4, 4), (0.0, 0.0, 3, 3), (0.0, 0.0, 2, 2), (0.25, 0.1, 4, 4), (0.4, 0.2, 4, 4), (0.4, 0.2, 3, 3)),
    *((0.5, 0.4, 4, 4), (0.5, 0.4, 3, 3)),
]


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 6,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    part: Annotated[list[str] | None, typer.Option(help="keys, values or both; all if left out.")] = None,
    format: FormatOption = "table",
) -> None:
    """Measure and print."""
    loaded, _, chosen = load(model, text, documents, prefix, scored)
    for name in part or ("keys", "values", "both"):
        if name == "both":
            trials = [
                named(_label(f"{r:g} / {rv:g}", f"{b} / {bv}"), "grace-opt", r, rv, key_bits=b, value_bits=bv)
                for r, rv, b, bv in BOTH
            ]
            bits = [((1 - r) * (b + 1) + (1 - rv) * (bv + 1)) / 2 for r, rv, b, bv in BOTH]
        else:
            kind = name.removesuffix("s")
            trials = [_one(kind, ratio, bits) for ratio, bits in KEYS]
            bits = [(1 - ratio) * (b + 1) for ratio, b in KEYS]
            if kind == "key":
                trials += [named(f"think's {ratio}, 4 bit", "think", ratio, key_bits=4) for ratio in (0.5, 0.6)]
                bits += [2.5, 2.0]
        records = measure(loaded, chosen, trials)
        rows: list[Record] = [
            {"bits an element": each, "policy": record["method"], "KL": shown(record["kl"])}
            for each, record in zip(bits, records, strict=True)
        ]
        rows.sort(key=lambda row: float(row["bits an element"]))
        show(f"{name.capitalize()}, {documents} documents", rows, format)


def _one(kind: str, ratio: float, bits: int) -> Trial:
    options: dict[str, Any] = {f"{kind}_bits": bits}
    ratios = (ratio, 0.0) if kind == "key" else (0.0, ratio)
    return named(_label(f"{ratio:g}", str(bits)), "grace-opt", *ratios, **options)


def _label(pruned: str, bits: str) -> str:
    return f"{bits} bit alone" if set(pruned) <= {"0", " ", "/"} else f"prune {pruned}, {bits} bit"


if __name__ == "__main__":
    typer.run(main)
