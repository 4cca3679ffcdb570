"""Which objective predicts KL: rank correlation of each objective's error with the measured KL, over many masks.

    python benchmarks/quality/proxies.py [--documents 4] [-f markdown]

The masks of a document are random ones, mixtures of random and greedy ones, and the greedy and optimal ones of every
objective, uniform at one ratio, without a read-out. Errors are summed over heads; `attention` counts each query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr
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
    show,
)

from grace_opt.compression.budget import Budget
from grace_opt.compression.headmaps import Compression, LayerMaps, channel_map
from grace_opt.compression.method import METHODS, compress
from grace_opt.evaluate.prefill import log_probabilities, prefill
from grace_opt.evaluate.run import divergence
from grace_opt.evaluate.statistics import bootstrap_mean
from grace_opt.graphs.objectives import KEY_OBJECTIVES

PLAIN = replace(METHODS["grace-opt"], budget="uniform", readout="none")


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 4,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    ratio: Annotated[float, typer.Option(help="Of the key channels.")] = 0.5,
    format: FormatOption = "table",
) -> None:
    """Measure and print."""
    loaded, _, chosen = load(model, text, documents, prefix, scored)
    names = ["logit", "centered", "attention, 2 spans", "attention"]
    correlations: dict[str, list[float]] = {name: [] for name in names}
    near: dict[str, list[float]] = {name: [] for name in names}
    for number, ids in enumerate(chosen.ids):
        state = prefill(loaded, ids, prefix, 32)
        dense = list(log_probabilities(state, None))
        masks = _masks(state, ratio, np.random.default_rng(number))
        kl = [divergence(state, dense, log_probabilities(state, mask))[0].mean() for mask in masks]
        for name in names:
            layers = state.observed(32, 32, 4, 2 if "spans" in name else None)
            graphs = {i: KEY_OBJECTIVES[name.split(",")[0]](seen).cpu().numpy() for i, seen in layers.items()}
            errors = [_error(graphs, mask) for mask in masks]
            correlations[name].append(float(spearmanr(errors, kl).statistic))
            near[name].append(float(spearmanr(errors[:9], kl[:9]).statistic))
    rows: list[Record] = []
    for name in names:
        every, chosen_ones = bootstrap_mean(correlations[name]), bootstrap_mean(near[name])
        rows.append(
            {
                "objective": name,
                "rank correlation with KL, all masks": f"{every.mean:.2f} {_range(every)}",
                "greedy, optimal and diagonal masks only": f"{chosen_ones.mean:.2f} {_range(chosen_ones)}",
            }
        )
    show(f"Ratio {ratio:g}, {len(chosen.ids)} documents, {len(masks)} masks each", rows, format)


def _range(interval: Any) -> str:
    return "" if interval.low is None else f"[{interval.low:.2f}, {interval.high:.2f}]"


def _masks(state: Any, ratio: float, rng: np.random.Generator) -> list[Compression]:
    layers = state.observed(32, 32, 4, 2)
    solvers = ("independent", "greedy", "branch-and-bound")
    masks = [
        compress(replace(PLAIN, objective=objective, solver=solver), layers, Budget(ratio))
        for objective in ("logit", "centered", "attention")
        for solver in solvers
    ]
    for base in (masks[1], masks[7]):
        masks += [_mixed(base, layers, share, rng) for share in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)]
    return masks


def _mixed(base: Compression, layers: Any, share: float, rng: np.random.Generator) -> Compression:
    """A mask with a share of each head's pruned channels exchanged for kept ones, at random."""
    maps = {}
    for i, seen in layers.items():
        heads = []
        for head in base.layers[i].heads["key"]:
            n, keep = len(head.constant), head.encode.numpy()
            pruned = np.setdiff1d(np.arange(n), keep)
            count = round(share * min(len(pruned), len(keep)))
            out, into = rng.choice(keep, count, replace=False), rng.choice(pruned, count, replace=False)
            heads.append(channel_map(np.sort([*np.setdiff1d(keep, out), *into]), n, None, seen.keys.device))
        maps[i] = LayerMaps({"key": heads})
    return Compression(maps, base.recent_window, base.sinks)


def _error(graphs: dict[int, np.ndarray], mask: Compression) -> float:
    total = 0.0
    for i, weights in graphs.items():
        for W, head in zip(weights, mask.layers[i].heads["key"], strict=True):
            x = np.ones(len(W))
            x[head.encode.numpy()] = 0
            total += float(x @ W @ x)
    return total


if __name__ == "__main__":
    typer.run(main)
