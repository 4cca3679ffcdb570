"""Which objective predicts KL: rank correlation of each objective's error with the measured KL, over many masks.

    python benchmarks/quality/proxies.py [--documents 4] [-f markdown]

The masks of a document are random ones, mixtures of random and greedy ones, and the greedy and optimal ones of every
objective, uniform at one ratio, without a read-out. Errors are summed over heads; `attention` counts each query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
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
    named,
    show,
)

from grace_opt.compression.channels import Channels
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.kl import divergence
from grace_opt.evaluate.replay import log_probabilities, replay
from grace_opt.evaluate.statistics import bootstrap_mean
from grace_opt.graphs.objectives import KEY_OBJECTIVES


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
        captured = capture(loaded, ids, prefix, 32)
        plain = torch.cat(list(log_probabilities(captured, dense(captured))))
        masks = _masks(captured, ratio, np.random.default_rng(number))
        kl = [_kl(captured, plain, mask) for mask in masks]
        for name in names:
            layers = captured.observed(32, Windows(), 2 if "spans" in name else None)
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


def _kl(captured: Captured, plain: torch.Tensor, mask: CachePlan) -> float:
    with torch.inference_mode(), replay(captured, mask) as past:
        return float(divergence(captured, plain, log_probabilities(captured, past))[0].mean())


def _masks(captured: Captured, ratio: float, rng: np.random.Generator) -> list[CachePlan]:
    solvers = ("independent", "greedy", "branch-and-bound")
    options: dict[str, Any] = {"budget": "uniform", "readout_fit": "none"}
    masks = [
        named("", "grace-opt", ratio, objective=objective, solver=solver, **options).plan(captured)
        for objective in ("logit", "centered", "attention")
        for solver in solvers
    ]
    for base in (masks[1], masks[7]):
        masks += [_mixed(base, share, rng) for share in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)]
    return masks


def _mixed(base: CachePlan, share: float, rng: np.random.Generator) -> CachePlan:
    """A mask with a share of each head's pruned channels exchanged for kept ones, at random."""
    layers: dict[int, LayerPlan] = {}
    for layer in base:
        heads = []
        for codec in layer.codecs["key"]:
            keep, pruned = np.split(codec.order.numpy(), [codec.kept])
            count = round(share * min(len(pruned), len(keep)))
            out, into = rng.choice(keep, count, replace=False), rng.choice(pruned, count, replace=False)
            heads.append(Channels.keeping(np.sort([*np.setdiff1d(keep, out), *into]), codec.n))
        layers[layer.index] = replace(layer, codecs={"key": heads})
    return CachePlan(layers)


def _error(graphs: dict[int, np.ndarray], mask: CachePlan) -> float:
    total = 0.0
    for i, weights in graphs.items():
        for W, codec in zip(weights, mask.layers[i].codecs["key"], strict=True):
            x = np.ones(len(W))
            x[codec.keep.numpy()] = 0
            total += float(x @ W @ x)
    return total


if __name__ == "__main__":
    typer.run(main)
