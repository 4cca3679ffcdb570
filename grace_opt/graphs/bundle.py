"""The graph bundle: one safetensors file with the channel graph of every layer and KV head (docs/formats.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.errors import InputError, shown
from grace_opt.files import replacing, write_safetensors
from grace_opt.heads import CHANNELS, LAYERS, HeadName, Kind, check_geometry
from grace_opt.problem import BoolArray, FloatArray, IntArray, SubsetProblem, prune_count
from grace_opt.tensor_file import TensorFile, tensor_file

FORMAT, VERSION = "grace_opt.graphs", "1"
METADATA_VALUE, METADATA_TOTAL = 4096, 1 << 16  #: characters; metadata is shown in lists, so that it must stay small
JOINT_CHANNELS = 1 << 14  #: of all KV heads of a layer, side by side
NARROW_LIMIT = 1 << 28  #: bytes that a file of numbers narrower than 32 bits may take as float64

_STATISTICS = (
    *("query_gram", "key_gram", "key_mean", "value_gram", "value_mean", "attention_gram", "attention_mean"),
    *("protected", "groups"),
)


#: Gram matrices that joint ranks are fitted to (`grace_opt.graphs.joint`)
BASES = ("cskv", "attention", "asvd")
JointGrams = Mapping[str, FloatArray]  # basis -> float64[H n, H n]; "bias" -> float64[H n]


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
    """The graphs of a model, sorted by layer, KV head and kind, and the file's metadata.

    ``joint``: of layers and kinds, what joint ranks are fitted to, if it was asked for.
    """

    heads: tuple[HeadGraph, ...]
    metadata: Mapping[str, str]
    joint: Mapping[tuple[int, Kind], JointGrams] = field(default_factory=dict)

    def problems(
        self, ratio: float, *, value_ratio: float | None = None, protect: bool = True, align: int = 1
    ) -> list[SubsetProblem]:
        """One problem a head that prunes floor(ratio * n) of its n channels (the uniform budget), or one less where
        all channels are tied in pairs; fewer, so that a multiple of ``align`` is kept.

        ``value_ratio`` is for graphs of values, ``ratio`` if left out. ``protect=False`` ignores the bundle's protected
        channels. Raises InputError if a ratio is outside [0, 1), or leaves a head with more to prune than is prunable.
        """
        return list(self._problems(ratio, ratio if value_ratio is None else value_ratio, protect, align))

    def check(self) -> None:
        """Raise InputError if a head makes no problem, or the metadata does not fit the heads; holds one at a time."""
        self.geometry()
        for _ in self._problems(0.0, 0.0, True, 1):
            pass

    def _problems(self, ratio: float, value_ratio: float, protect: bool, align: int) -> Iterator[SubsetProblem]:
        ratios = {"key": ratio, "value": value_ratio}
        for each in ratios.values():
            if not 0 <= each < 1:  # also refuses NaN
                raise InputError(f"the ratio must be at least 0 and below 1, got {each}")
        for head in self.heads:
            yield SubsetProblem(
                head.weights,
                prune=_count(ratios[head.kind], head, align),
                protected=head.protected if protect else None,
                groups=head.groups,
                name=head.name,
            )

    def geometry(self) -> tuple[int, int]:
        """Layers, 0 if the metadata does not say how many, and KV heads of each. Raises InputError for what no model
        has, or fewer than the bundle holds graphs of."""
        layers = self.integer("num_hidden_layers", 0, most=LAYERS)
        last, last_head = (
            1 + max(numbers) for numbers in zip(*((h.layer, h.kv_head) for h in self.heads), strict=True)
        )
        kv_heads = self.integer("num_key_value_heads", last_head, least=1)
        if layers and last > layers:
            raise InputError(f"the bundle has graphs of layer {last - 1}, and its metadata says {layers} layers")
        check_geometry("the bundle", max(layers, last), kv_heads, max(len(head.weights) for head in self.heads))
        return layers, kv_heads

    def integer(self, key: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number of the metadata. Raises InputError for one that is none, or out of range."""
        text = str(self.metadata.get(key, default))
        if not re.fullmatch("-?[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise InputError(
                f"the bundle's metadata says {key} = {shown(text, 60)!r}, which is not a whole number from {least} to "
                f"{most}; calibrate again"
            )
        return int(text)

    def positive(self, key: str) -> float | None:
        """A number of the metadata, None if it says nothing. Raises InputError for what is none, or not positive."""
        text = self.metadata.get(key)
        try:
            number = None if text is None else float(text)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not 0 < number < math.inf:
            raise InputError(
                f"the bundle's metadata says {key} = {shown(str(text), 60)!r}, which is not a positive number; "
                "calibrate again"
            )
        return number


def _count(ratio: float, head: HeadGraph, align: int) -> int:
    """How many channels a ratio prunes: rounded down, and to whole pairs where all channels are tied in pairs."""
    count = prune_count(ratio, len(head.weights), align=align)
    paired = head.groups is not None and (np.unique(head.groups, return_counts=True)[1] == 2).all()
    return count - count % 2 if paired else count


def save_bundle(bundle: GraphBundle, path: str | Path) -> None:
    """Write a bundle; the file appears under its name only when it is whole. Raises InputError, also for arrays or
    metadata that `load_bundle` would refuse."""
    _check_metadata(bundle.metadata, "the bundle")
    tensors: dict[str, np.ndarray] = {}
    for head in bundle.heads:
        for statistic in ("weights", *_STATISTICS):
            array = getattr(head, statistic)
            if array is not None:
                tensors[f"{head.name}.{statistic}"] = np.asarray(array)
                _check_shape(f"{head.name}.{statistic}", np.shape(array), np.shape(head.weights))
    for (layer, kind), held in bundle.joint.items():
        tensors |= {f"layers.{layer}.joint.{kind}.{name}": np.asarray(array) for name, array in held.items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, {**bundle.metadata, "format": FORMAT, "version": VERSION})


def load_bundle(path: str | Path) -> GraphBundle:
    """Read and check a bundle. Tensors of unknown names are left alone.

    Raises:
        InputError: if the file is missing, truncated, of another format or version, or holds no graph; if a tensor has
            the wrong type or shape, or names and metadata speak of more layers, heads or channels than any model has.
            (NaN and asymmetry are found when a problem is made of a graph: `GraphBundle.check`.)
    """
    with tensor_file(path) as file:
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is not a graph bundle (format {metadata.get('format')!r}, expected {FORMAT!r})")
        if metadata.get("version") != VERSION:
            raise InputError(
                f"{path} is a graph bundle of version {metadata.get('version')!r}; this grace-opt reads version "
                f"{VERSION}"
            )
        _check_metadata(metadata, str(path))
        found: dict[HeadName, set[str]] = {}
        for name in file:
            prefix, _, statistic = name.rpartition(".")
            head = HeadName.match(prefix)
            if head is not None:
                found.setdefault(head, set()).add(statistic)
        named = [head for head in sorted(found) if "weights" in found[head]]
        if not named:
            raise InputError(f"{path} holds no graph (no tensor named layers.<i>.kv_heads.<h>.<key|value>.weights)")
        for head in named:
            _check_head(file, head, found[head], path)
        _check_memory(file, path)
        heads = tuple(_head(file, head, found[head]) for head in named)
        bundle = GraphBundle(heads, metadata, _joint(file, {each.layer for each in heads}, path))
    bundle.geometry()
    return bundle


def _joint(
    file: TensorFile, layers: Collection[int], path: str | Path
) -> dict[tuple[int, Kind], dict[str, FloatArray]]:
    """What joint ranks are fitted to, of layers that have graphs."""
    found: dict[tuple[int, Kind], dict[str, FloatArray]] = {}
    for name in file:
        matched = re.fullmatch(r"layers\.([0-9]{1,4})\.joint\.(key|value)\.(" + "|".join((*BASES, "bias")) + ")", name)
        if matched is None or int(matched[1]) not in layers:
            continue
        shape, dtype = file.shape(name), file.dtype(name)
        square = len(shape) == 1 if matched[3] == "bias" else len(shape) == 2 and shape[0] == shape[1]
        if not square or not 0 < shape[0] <= JOINT_CHANNELS or dtype not in ("F64", "F32"):
            raise InputError(
                f"{path}: {name} must be a square matrix (a bias: a vector) of up to {JOINT_CHANNELS} rows, in F32 or "
                f"F64, not {dtype}{list(shape)}; calibrate again"
            )
        kind: Kind = "key" if matched[2] == "key" else "value"
        found.setdefault((int(matched[1]), kind), {})[matched[3]] = file[name].astype(np.float64, copy=False)
    return found


def _check_metadata(metadata: Mapping[str, Any], where: str) -> None:
    sizes = {str(key): len(str(value)) for key, value in metadata.items()}
    for key, size in sizes.items():
        if size > METADATA_VALUE or len(key) > METADATA_VALUE or "\0" in key or "\0" in str(metadata[key]):
            raise InputError(
                f"{where}: the metadata {shown(key, 60)!r} has {size} characters, of {METADATA_VALUE} allowed, or "
                "holds a NUL; shorten it"
            )
    total = sum(map(len, sizes)) + sum(sizes.values())
    if total > METADATA_TOTAL:
        raise InputError(f"{where}: the metadata has {total} characters, of {METADATA_TOTAL} allowed; shorten it")


def _check_head(file: TensorFile, head: HeadName, statistics: set[str], path: str | Path) -> None:
    """Types and shapes of one head's tensors, before they are read."""
    weights = file.shape(f"{head}.weights")
    for statistic in ("weights", *_STATISTICS):
        name = f"{head}.{statistic}"
        if statistic not in statistics:
            continue
        _check_shape(f"{path}: {name}", file.shape(name), weights)
        dtype = file.dtype(name)
        if statistic not in ("protected", "groups") and not dtype.startswith(("F", "BF")):
            raise InputError(f"{path}: {name} must hold real floating-point numbers, not {dtype}; save it as F64")


def _check_shape(name: str, shape: tuple[int, ...], weights: tuple[int, ...]) -> None:
    if name.endswith(".weights"):
        if len(shape) != 2 or shape[0] != shape[1] or not 0 < shape[0] <= CHANNELS:
            raise InputError(f"{name} must be a square matrix of up to {CHANNELS} rows, not of shape {shape}")
        return
    expected = weights if name.endswith("gram") else weights[:1]
    if shape != expected:
        raise InputError(f"{name} must have shape {expected}, not {shape}")


def _check_memory(file: TensorFile, path: str | Path) -> None:
    """Refuse a file whose narrow numbers would take far more memory than the file has bytes."""
    narrow = [name for name in file if file.dtype(name) not in ("F64", "F32")]
    taken = sum(8 * math.prod(file.shape(name)) for name in narrow)
    if taken > NARROW_LIMIT:
        types = ", ".join(sorted({file.dtype(name) for name in narrow}))
        raise InputError(f"{path}: its tensors of {types} take {taken} bytes as float64; save them as F32 or F64")


def _head(file: TensorFile, head: HeadName, statistics: set[str]) -> HeadGraph:
    def held(statistic: str) -> Any:
        return file[f"{head}.{statistic}"] if statistic in statistics else None

    def real(statistic: str) -> FloatArray | None:
        return file[f"{head}.{statistic}"].astype(np.float64, copy=False) if statistic in statistics else None

    weights = real("weights")
    assert weights is not None
    return HeadGraph(
        head.layer,
        head.kv_head,
        head.kind,
        weights,
        **{statistic: real(statistic) for statistic in _STATISTICS[:-2]},
        protected=held("protected"),  # their values are checked when a problem is made of them
        groups=held("groups"),
    )
