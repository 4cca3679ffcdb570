"""What each part of grace-opt is worth: one thing changed at a time, keys at one ratio.

python benchmarks/quality/ablation.py [--documents 6] [--ratio 0.7] [-f markdown]
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
    ScoredOption,
    TextOption,
    load,
    measure,
    named,
    show,
    shown,
)

from grace_opt.graphs.protection import Protection

OURS: dict[str, dict[str, Any]] = {
    "grace-opt": {},
    "no sinks": {"sinks": 0},
    "no recent window": {"recent_window": 0},
    "recent window 128": {"recent_window": 128},
    "observation window 8": {"observation_window": 8},
    "observation window 128": {"observation_window": 128},
    "a span a query (exact)": {"spans": None},
    "graph: logit": {"objective": "logit"},
    "graph: centered": {"objective": "centered"},
    "read-out: none": {"readout_fit": "none"},
    "read-out: mean": {"readout_fit": "mean"},
    "read-out: least squares": {"readout_fit": "least-squares"},
    "mixing 0.3": {"mixing": 0.3},
    "budget: uniform": {"budget": "uniform"},
    "multiples of 8": {"align": 8, "floor": 8},
    "protection 5 %": {"protection": Protection(1.0, 0.05, 0.05)},
    "protection 10 %": {"protection": Protection(1.0, 0.10, 0.10)},
    "protection 20 %": {"protection": Protection(1.0, 0.20, 0.20)},
}
GRACE: dict[str, dict[str, Any]] = {
    "grace": {},
    "grace, prunable tokens only": {"prunable_only": True},
    "grace, no protection": {"protection": None},
    "grace, protection 10 %": {"protection": Protection(1.0, 0.10, 0.10)},
    "grace, protection 20 %": {"protection": Protection(1.0, 0.20, 0.20)},
    "grace, no sinks": {"sinks": 0},
    "grace, least-squares read-out": {"readout_fit": "least-squares"},
}


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 6,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    ratio: Annotated[float, typer.Option(help="Of the key channels.")] = 0.7,
    format: FormatOption = "table",
) -> None:
    """Measure and print; the p-value is of the paired test against the first row."""
    loaded, _, chosen = load(model, text, documents, prefix, scored)
    trials = [named(label, "grace-opt", ratio, **fields) for label, fields in OURS.items()]
    trials += [named(label, "grace", ratio, **fields) for label, fields in GRACE.items()]
    rows = [
        {
            "policy": r["method"],
            "KL": shown(r["kl"]),
            "p": r["against_first"],
            "bytes/token": round(r["bytes_per_token"]),
        }
        for r in measure(loaded, chosen, trials)
    ]
    show(f"Keys at {ratio:g}, {documents} documents", rows, format)


if __name__ == "__main__":
    typer.run(main)
