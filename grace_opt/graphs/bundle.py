"""The graph bundle: one safetensors file with the channel graph of every layer and KV head (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grace_opt.errors import InputError
from grace_opt.files import read_safetensors, replacing, write_safetensors
from grace_opt.heads import HeadName, Kind
from grace_opt.problem import BoolArray, FloatArray, IntArray, SubsetProblem, prune_count

FORMAT, VERSION = "grace_opt.graphs", "1"

_STATISTICS = (
    *("query_gram", "key_gram", "key_mean", "value_gram", "value_mean", "attention_gram", "attention_mean"),
    *("protected", "groups"),
)


@dataclass(frozen=True, eq=False)
class HeadGraph:
    """The channel graph of one KV head, for its keys or its values.

    ``weights`` float64[n, n] is W. Optional: ``query_gram``; the Gram matrix float64[n, n] and mean float64[n] of the
    prunable keys (``key_gram``, ``key_mean``) or values, and both under attention's weights (``attention_gram``,
    ``attention_mean``); ``protected`` bool[n], ``groups`` int64[n] (tied channels, see SubsetProblem).
    """

    layer: int
    kv_head: int
    kind: Kind
    weights: FloatArray
    query_gram: FloatArray | None = None
    key_gram: FloatArray | None = None
    key_mean: FloatArray | None = None
    value_gram: FloatArray | None = None
    value_mean: FloatArray | None = None
    attention_gram: FloatArray | None = None
    attention_mean: FloatArray | None = None
    protected: BoolArray | None = None
    groups: IntArray | None = None

    @property
    def name(self) -> str:
        """The prefix of the head's tensors, and the name of its problem."""
        return str(HeadName(self.layer, self.kv_head, self.kind))


@dataclass(frozen=True, eq=False)
class GraphBundle:
    """The graphs of a model, sorted by layer, KV head and kind, and the file's metadata."""

    heads: tuple[HeadGraph, ...]
    metadata: Mapping[str, str]

    def problems(
        self, ratio: float, *, value_ratio: float | None = None, protect: bool = True, align: int = 1
    ) -> list[SubsetProblem]:
        """One problem a head that prunes floor(ratio * n) of its n channels (the uniform budget), or one less where
        all channels are tied in pairs; fewer, so that a multiple of ``align`` is kept.

        ``value_ratio`` is for graphs of values, ``ratio`` if left out. ``protect=False`` ignores the bundle's protected
        channels. Raises InputError if a ratio is outside [0, 1), or leaves a head with more to prune than is prunable.
        """
        ratios = {"key": ratio, "value": ratio if value_ratio is None else value_ratio}
        for each in ratios.values():
            if not 0 <= each < 1:  # also refuses NaN
                raise InputError(f"the ratio must be at least 0 and below 1, got {each}")
        return [
            SubsetProblem(
                head.weights,
                prune=_count(ratios[head.kind], head, align),
                protected=head.protected if protect else None,
                groups=head.groups,
                name=head.name,
            )
            for head in self.heads
        ]

    def integer(self, key: str, default: int) -> int:
        """A whole number of the metadata."""
        text = self.metadata.get(key, str(default))
        try:
            return int(text)
        except ValueError:
            raise InputError(f"the bundle's metadata says {key} = {text!r}, which is not a whole number") from None


def _count(ratio: float, head: HeadGraph, align: int) -> int:
    """How many channels a ratio prunes: rounded down, and to whole pairs where all channels are tied in pairs."""
    count = prune_count(ratio, len(head.weights), align=align)
    paired = head.groups is not None and (np.unique(head.groups, return_counts=True)[1] == 2).all()
    return count - count % 2 if paired else count


def save_bundle(bundle: GraphBundle, path: str | Path) -> None:
    """Write a bundle; the file appears under its name only when it is whole. Raises InputError."""
    tensors: dict[str, np.ndarray] = {}
    for head in bundle.heads:
        tensors[f"{head.name}.weights"] = head.weights
        for statistic in _STATISTICS:
            array = getattr(head, statistic)
            if array is not None:
                tensors[f"{head.name}.{statistic}"] = array
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, {**bundle.metadata, "format": FORMAT, "version": VERSION})


def load_bundle(path: str | Path) -> GraphBundle:
    """Read and check a bundle. Tensors of unknown names are left alone.

    Raises:
        InputError: if the file is missing, truncated, of another format or version, or holds no graph, or a
            tensor has the wrong shape. (NaN and asymmetry are found when a problem is made of a graph.)
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a graph bundle (format {metadata.get('format')!r}, expected {FORMAT!r})")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{path} is a graph bundle of version {metadata.get('version')!r}; this grace-opt reads version {VERSION}"
        )
    found: dict[HeadName, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        prefix, _, statistic = name.rpartition(".")
        head = HeadName.match(prefix)
        if head is not None:
            found.setdefault(head, {})[statistic] = array
    heads = tuple(_head(head, found[head], path) for head in sorted(found) if "weights" in found[head])
    if not heads:
        raise InputError(f"{path} holds no graph (no tensor named layers.<i>.kv_heads.<h>.<key|value>.weights)")
    return GraphBundle(heads, metadata)


def _head(head: HeadName, tensors: Mapping[str, np.ndarray], path: str | Path) -> HeadGraph:
    name = f"{path}: {head}"
    weights = tensors["weights"]
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or weights.shape[0] == 0:
        raise InputError(f"{name}.weights must be a square matrix, not of shape {weights.shape}")
    n = len(weights)
    for statistic in _STATISTICS:
        expected = (n, n) if statistic.endswith("gram") else (n,)
        if statistic in tensors and tensors[statistic].shape != expected:
            raise InputError(f"{name}.{statistic} must have shape {expected}, not {tensors[statistic].shape}")

    def real(statistic: str) -> FloatArray | None:
        return tensors[statistic].astype(np.float64, copy=False) if statistic in tensors else None

    return HeadGraph(
        head.layer,
        head.kv_head,
        head.kind,
        weights.astype(np.float64, copy=False),
        **{statistic: real(statistic) for statistic in _STATISTICS[:-2]},
        protected=tensors.get("protected"),  # their values are checked when a problem is made of them
        groups=tensors.get("groups"),
    )
