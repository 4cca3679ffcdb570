"""The ``logit`` objective: the graph whose subgraph weights are squared errors of the attention logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from grace_opt.errors import InputError
from grace_opt.graphs.bundle import HeadGraph
from grace_opt.graphs.protection import Protection, salient_channels
from grace_opt.problem import FloatArray

if TYPE_CHECKING:
    import torch


@dataclass
class LogitGraphs:
    """Sums up the logit graphs of all layers and KV heads, one window of text after the other.

    For a window with observed queries Q_g (of the query heads g that share a KV head) and prunable keys K,
    W = (sum_g Q_g'Q_g) o (K'K): pruning P changes the squared Frobenius norm of the logits by sum_{i,j in P} W_ij
    (GRACE, arXiv 2604.16983, eq. 4-6, summed over the group). No softmax scale, no mean removal. The graph of
    several windows is the mean of theirs, so that it measures the mean error of a window; W equals
    query_gram o key_gram entry by entry when there is one window.

    Memory is O(layers * KV heads * n^2) float64, whatever the number of tokens.
    """

    observation_window: int
    recent_window: int
    sinks: int
    windows: dict[int, int] = field(default_factory=dict)
    _sums: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Add one window of one layer: post-RoPE queries [1, Hq, T, n] and keys [1, Hkv, T, n], Hkv divides Hq."""
        import torch

        _, heads, tokens, n = keys.shape
        device = keys.device if keys.device.type != "mps" else torch.device("cpu")  # no float64 there
        old = keys[0, :, self.sinks : tokens - self.recent_window].to(device, torch.float64)
        observed = queries[0, :, -self.observation_window :].to(device, torch.float64)
        observed = observed.reshape(heads, -1, n)  # query heads of a group are neighbours
        query_gram = observed.mT @ observed
        key_gram = old.mT @ old
        terms = {
            "weights": query_gram * key_gram,
            "query_gram": query_gram,
            "key_gram": key_gram,
            "key_mean": old.mean(1),
        }
        sums = self._sums.get(layer)
        if sums is None:
            self._sums[layer] = terms
        else:
            for name, term in terms.items():
                sums[name] += term
        self.windows[layer] = self.windows.get(layer, 0) + 1

    def heads(self, protection: Protection | None) -> tuple[HeadGraph, ...]:
        """The graphs, with ``protected`` from the key norms unless ``protection`` is None."""
        graphs = []
        for layer in sorted(self._sums):
            count = self.windows[layer]
            mean = {name: (total / count).cpu().numpy() for name, total in self._sums[layer].items()}
            for head in range(len(mean["weights"])):
                if not all(np.isfinite(statistic[head]).all() for statistic in mean.values()):
                    raise InputError(
                        f"the queries or keys of layer {layer}, KV head {head} are not finite; check the model's "
                        "weights, or use float32"
                    )
                key_gram: FloatArray = mean["key_gram"][head]
                norms = np.sqrt(np.diagonal(key_gram))
                graphs.append(
                    HeadGraph(
                        layer,
                        head,
                        "key",
                        # One rounding may differ between (i, j) and (j, i) of a blocked product.
                        weights=_symmetric(mean["weights"][head]),
                        query_gram=_symmetric(mean["query_gram"][head]),
                        key_gram=_symmetric(key_gram),
                        key_mean=mean["key_mean"][head],
                        protected=None if protection is None else salient_channels(norms, protection),
                    )
                )
        return tuple(graphs)


def _symmetric(matrix: FloatArray) -> FloatArray:
    return np.ascontiguousarray((matrix + matrix.T) / 2)
