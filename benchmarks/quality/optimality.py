"""Does an optimal subset keep more quality than a greedy one? Each objective, both solvers, with and without read-out.

python benchmarks/quality/optimality.py [--documents 6] [-f markdown]
"""

from __future__ import annotations

import typer
from study import (
    TEXTS,
    DocumentsOption,
    FormatOption,
    ModelOption,
    PrefixOption,
    ScoredOption,
    TextOption,
    by_method,
    load,
    measure,
    named,
    show,
)

from grace_opt.evaluate.statistics import paired


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 6,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    format: FormatOption = "table",
) -> None:
    """Measure and print."""
    loaded, _, chosen = load(model, text, documents, prefix, scored)
    cases = [(name, readout) for name in ("logit", "centered", "attention") for readout in ("none", "attention")]
    solvers = ("independent", "greedy", "branch-and-bound")
    trials = []
    for ratio in (0.5, 0.7):
        for objective, readout in cases:
            for solver in solvers:
                label = f"{objective}, read-out {readout}, {solver}"
                fields = {"objective": objective, "readout_fit": readout, "solver": solver, "budget": "uniform"}
                trials.append(named(label, "grace-opt", ratio, **fields))
    records = measure(loaded, chosen, trials)
    show(f"Uniform budget, {documents} documents", by_method(records), format)
    rows = []
    for i in range(0, len(records), len(solvers)):
        greedy, exact = records[i + 1], records[i + 2]
        test = paired(exact["kl_documents"], greedy["kl_documents"])
        rows.append(
            {
                "case": exact["method"].rsplit(",", 1)[0],
                "ratio": exact["ratio"],
                "optimal over greedy": exact["kl"]["mean"] / greedy["kl"]["mean"],
                "p": test.p_value,
            }
        )
    show("KL of the optimal selection over the greedy one's", rows, format)


if __name__ == "__main__":
    typer.run(main)
