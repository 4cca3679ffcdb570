"""Graphs and moments of many windows of text, summed up one window after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.graphs.bundle import HeadGraph
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES
from grace_opt.graphs.observed import Observed, double
from grace_opt.graphs.protection import Protection, salient_channels
from grace_opt.heads import Kind
from grace_opt.problem import FloatArray, IntArray


@dataclass
class GraphSums:
    """The graphs of all layers and KV heads under an objective for keys and, if named, one for values.

    The graph of several windows is the mean of theirs, so that it measures the mean error of a window. Beside W stand
    the moments that read-outs are fitted to, per window: the tokens' Gram matrix (a sum over prunable tokens) and mean,
    and both under the attention that each token receives (weights that sum to 1). Memory is O(layers * KV heads * n^2)
    float64, whatever the number of tokens.
    """

    objective: str
    value_objective: str | None = None
    windows: dict[int, int] = field(default_factory=dict)
    _sums: dict[tuple[int, Kind], dict[str, Tensor]] = field(default_factory=dict)

    def add(self, layer: int, seen: Observed) -> None:
        """Add one window of one layer."""
        queries = double(seen.grouped)
        self._add(layer, "key", KEY_OBJECTIVES[self.objective](seen), seen.keys, seen, query_gram=queries.mT @ queries)
        if self.value_objective is not None:
            self._add(layer, "value", VALUE_OBJECTIVES[self.value_objective](seen), seen.values, seen)
        self.windows[layer] = self.windows.get(layer, 0) + 1

    def _add(self, layer: int, kind: Kind, weights: Tensor, tokens: Tensor, seen: Observed, **more: Tensor) -> None:
        old = double(tokens[:, seen.counted])
        received = seen.token_weights.to(old)[..., None]
        terms = {
            "weights": weights,
            f"{kind}_gram": old.mT @ old,
            f"{kind}_mean": old.mean(1),
            "attention_gram": (old * received).mT @ old,
            "attention_mean": (old * received).sum(1),
            **more,
        }
        sums = self._sums.setdefault((layer, kind), {})
        for name, term in terms.items():
            sums[name] = sums[name] + term if name in sums else term

    def heads(self, protection: Protection | None, groups: IntArray | None = None) -> tuple[HeadGraph, ...]:
        """The graphs, with ``protected`` key channels from the key norms unless ``protection`` is None.

        ``groups`` int64[n] ties key channels; of a group with a protected channel all are protected.
        """
        graphs = []
        for layer, kind in sorted(self._sums):
            count = self.windows[layer]
            mean = {name: (total / count).cpu().numpy() for name, total in self._sums[layer, kind].items()}
            for head in range(len(mean["weights"])):
                if not all(np.isfinite(statistic[head]).all() for statistic in mean.values()):
                    raise InputError(
                        f"the queries, keys or values of layer {layer}, KV head {head} are not finite; check the "
                        "model's weights, or use float32"
                    )
                protected = None
                if protection is not None and kind == "key":
                    protected = salient_channels(np.sqrt(np.diagonal(mean["key_gram"][head])), protection)
                    if groups is not None:
                        protected = np.isin(groups, groups[protected])
                # One rounding may differ between (i, j) and (j, i) of a blocked product.
                arrays: dict[str, Any] = {
                    name: _symmetric(each[head]) if each.ndim == 3 else each[head] for name, each in mean.items()
                }
                if kind == "key":
                    arrays["groups"] = groups
                graphs.append(HeadGraph(layer, head, kind, protected=protected, **arrays))
        return tuple(sorted(graphs, key=lambda graph: (graph.layer, graph.kv_head, graph.kind)))


def _symmetric(matrix: FloatArray) -> FloatArray:
    return np.ascontiguousarray((matrix + matrix.T) / 2)
