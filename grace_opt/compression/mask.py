"""KVMask: a cache plan with the model that it is for and where it comes from (docs/formats.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.compression.readout import READOUT_SCOPES, Readout, ReadoutRecipe
from grace_opt.errors import InputError
from grace_opt.heads import CHANNELS, Kind, check_geometry
from grace_opt.models.config import accepted_sha256, head_dim, text_config

Keep = tuple[NDArray[np.int32], ...]
Structure = Literal["channel", "rope_pair", "rope_pair_global"]
STRUCTURES: tuple[Structure, ...] = ("channel", "rope_pair", "rope_pair_global")


@dataclass(frozen=True, eq=False)
class KVMask:
    """What to do with a model's cache: a plan, and the model that it was made for.

    Attributes:
        model: the base model's name. ``config_sha256`` ties the mask to its configuration (see
            `grace_opt.models.config.config_sha256`), or is None when the graphs did not say.
        num_key_value_heads, head_dim: KV heads, and channels of a whole key.
        plan: what becomes of the tokens of each layer; layers that are absent stay whole. Channels of keys are numbered
            as in the model's own post-RoPE key tensor, those of values as in v_proj's output.
        num_hidden_layers, num_attention_heads: of the model, None if unknown.
        softmax_scale: the model's original one (pruning does not change it), or None for head_dim ** -0.5.
        prefill: ``full`` if the tokens of a prompt see each other whole, ``pruned`` if not.
        structure: what was selected together: a ``channel``; a ``rope_pair``; or the same pairs in all heads.
        align: of how many channels each head keeps a multiple.
        calibration, solver: who made it: from what text, by which solver, with which gap.
        unknown: fields of the file that this release does not know, kept as they are.
    """

    model: str
    num_key_value_heads: int
    head_dim: int
    plan: CachePlan
    config_sha256: str | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    softmax_scale: float | None = None
    prefill: str = "full"
    structure: Structure = "channel"
    align: int = 1
    calibration: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prefill not in ("full", "pruned"):
            raise InputError(f"the mask's prefill policy must be 'full' or 'pruned', got {self.prefill!r}")
        if self.structure not in STRUCTURES:
            raise InputError(f"the mask's structure must be one of {', '.join(STRUCTURES)}, got {self.structure!r}")
        check_geometry("the mask", self.layer_count, self.num_key_value_heads, self.head_dim)
        if self.softmax_scale is not None and not 0 < self.softmax_scale < math.inf:
            raise InputError(f"the mask's softmax_scale must be positive, got {self.softmax_scale!r}")
        for layer in self.plan:
            if layer.index < 0 or (self.num_hidden_layers is not None and layer.index >= self.num_hidden_layers):
                raise InputError(f"the mask has a layer {layer.index}: the model has {self.num_hidden_layers} layers")
            for kind, codecs in layer.codecs.items():
                self._check(f"the mask's {kind} channels of layer {layer.index}", kind, codecs)

    def _check(self, where: str, kind: Kind, codecs: Sequence[Codec]) -> None:
        heads = sum(codec.heads for codec in codecs)
        if heads != self.num_key_value_heads:
            raise InputError(f"{where} are for {heads} KV heads, and the model has {self.num_key_value_heads}")
        sizes = {codec.n for codec in codecs} - {0}
        check_geometry(where, self.layer_count, self.num_key_value_heads, max(sizes, default=0))
        if sizes and (len(sizes) > 1 or (kind == "key" and sizes != {self.head_dim})):
            raise InputError(f"{where} are for heads of {sorted(sizes)} channels, and the model's have {self.head_dim}")

    @classmethod
    def of_channels(
        cls,
        model: str,
        num_key_value_heads: int,
        head_dim: int,
        key_keep: Mapping[int, Sequence[ArrayLike]],
        value_keep: Mapping[int, Sequence[ArrayLike]] | None = None,
        *,
        recent_window: int = 32,
        sinks: int = 4,
        generated: Literal["keep", "prune"] = "prune",
        readout: ReadoutRecipe | None = None,
        readouts: Mapping[tuple[Kind, int, int], Readout] | None = None,
        **more: Any,
    ) -> KVMask:
        """A mask that keeps channels: layer -> one sorted list a KV head, of keys and of values.

        ``readout``: to be fitted to each prompt; ``readouts``: (kind, layer, KV head) -> a static one; neither: dropped
        channels read as zeros. ``more`` are fields of the mask. Raises InputError for channels that do not fit.
        """
        windows, layers = Windows(sinks, recent_window, generated), {}
        keeps: dict[Kind, Mapping[int, Sequence[ArrayLike]]] = {"key": key_keep, "value": value_keep or {}}
        for index in sorted({*key_keep, *keeps["value"]}):
            codecs: dict[Kind, list[Channels]] = {}
            for kind, keep in keeps.items():
                for head, kept in enumerate(keep.get(index, ())):
                    where = f"the mask's {kind} channels of layer {index}, KV head {head}"
                    static = None if readouts is None else readouts.get((kind, index, head))
                    codecs.setdefault(kind, []).append(checked_channels(kept, head_dim, static, where))
            layers[index] = LayerPlan(index, codecs, windows, readout)
        return cls(model, num_key_value_heads, head_dim, CachePlan(layers), **more)

    @property
    def windows(self) -> Windows:
        """Of the first layer; masks that grace-opt makes have one for all."""
        return next((layer.windows for layer in self.plan), Windows())

    @property
    def readout_scope(self) -> str:
        """``prefill`` if read-outs are fitted to each prompt, ``static`` if they are in the mask, or ``none``."""
        if any(layer.readout is not None for layer in self.plan):
            return READOUT_SCOPES[1]
        fitted = any(channels_of(c) and "matrix" in channels_of(c).tensors() for c in self._codecs())  # type: ignore[union-attr]
        return READOUT_SCOPES[2] if fitted else READOUT_SCOPES[0]

    def _codecs(self) -> list[Codec]:
        return [codec for layer in self.plan for codecs in layer.codecs.values() for codec in codecs]

    @property
    def layer_count(self) -> int:
        """How many layers there are, as far as the mask says."""
        return self.num_hidden_layers or 1 + max(self.plan.layers, default=-1)

    @property
    def key_keep(self) -> dict[int, Keep]:
        """Layer -> the kept key channels of each head, of the layers whose codecs keep channels."""
        return self.kept("key")

    @property
    def value_keep(self) -> dict[int, Keep]:
        """The same of values."""
        return self.kept("value")

    def kept(self, kind: Kind) -> dict[int, Keep]:
        """Layer -> one sorted int32 array of kept channels a KV head."""
        found = {}
        for layer in self.plan:
            channels = [channels_of(codec) for codec in layer.codecs.get(kind, ())]
            if channels and None not in channels:
                found[layer.index] = tuple(each.keep.numpy().astype(np.int32) for each in channels if each is not None)
        return found

    def static_readout(self, kind: Kind, layer: int, kv_head: int) -> Readout | None:
        """The static read-out of a head, if it has one."""
        channels = channels_of(self.plan.layers[layer].codecs[kind][kv_head])
        if channels is None or channels.matrix is None or channels.constant is None:
            return None
        return Readout(channels.constant.double().numpy(), channels.matrix.double().numpy())

    def keep_matrix(self, kind: Kind = "key") -> NDArray[np.bool_]:
        """bool[layers, KV heads, n]: True where a channel is kept; absent layers are all True."""
        keeps = self.kept(kind)
        sizes = {codec.n for layer in self.plan for codec in layer.codecs.get(kind, ())} - {0}
        matrix = np.ones((self.layer_count, self.num_key_value_heads, max(sizes, default=self.head_dim)), bool)
        for layer, keep in keeps.items():
            for head, kept in enumerate(keep):
                matrix[layer, head] = False
                matrix[layer, head, kept] = True
        return matrix

    def check_model(self, config: Any, name: str) -> None:
        """Raise InputError if the mask was made for a model of another configuration than ``config``."""
        text = text_config(config)
        this = name or str(text.model_type)
        wrong = f"this mask was made for {self.model!r}, not for {this!r}"
        if self.config_sha256 is not None and self.config_sha256 not in accepted_sha256(config):
            raise InputError(f"{wrong} (the configurations differ); make a mask for {this!r}")
        layers = text.num_hidden_layers
        if self.layer_count > layers:
            raise InputError(f"{wrong}: it has a layer {self.layer_count - 1}, and the model has {layers} layers")
        dim = head_dim(config)
        if dim is not None and dim != self.head_dim:
            raise InputError(f"{wrong}: it is for keys of {self.head_dim} channels, and these have {dim}")


def channels_of(codec: Codec) -> Channels | None:
    """The kept channels behind a codec, also behind integers; None for another kind of codec."""
    inner = getattr(codec, "inner", codec)
    return inner if isinstance(inner, Channels) else None


def checked_channels(keep: ArrayLike, n: int, static: Readout | None, where: str) -> Channels:
    """One head's. Raises InputError for channels that are not sorted, distinct and in range."""
    kept = np.asarray(keep)
    if not 0 < n <= CHANNELS:
        raise InputError(f"{where}: a head has from 1 to {CHANNELS} channels, not {n}")
    if kept.ndim != 1 or (kept.size and not np.issubdtype(kept.dtype, np.integer)):
        raise InputError(f"{where}: kept channels must be a list of whole numbers")
    if kept.size and not (kept[0] >= 0 and kept[-1] < n and (np.diff(kept) > 0).all()):
        raise InputError(f"{where}: kept channels must be sorted, distinct and in 0..{n - 1}")
    if static is None:
        return Channels.keeping(kept, n)
    expected = (n - len(kept), len(kept))
    if static.matrix.shape != expected or static.constant.shape != expected[:1]:
        raise InputError(f"{where}: the static read-out does not fit its channels; solve again")
    if not (np.isfinite(static.matrix).all() and np.isfinite(static.constant).all()):
        raise InputError(f"{where}: the static read-out holds numbers that are not finite; solve again")
    return Channels.keeping(kept, n, static.matrix, static.constant)
