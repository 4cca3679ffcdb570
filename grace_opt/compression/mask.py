"""KVMask: which channels of a key/value cache to keep, as inference runtimes read it (docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grace_opt.compression.readout import MIXING, SCOPES, Readout, bundle_moments, fit
from grace_opt.errors import InputError
from grace_opt.files import read_json, read_safetensors, replacing, write_safetensors
from grace_opt.graphs.bundle import GraphBundle
from grace_opt.models.config import config_sha256, head_dim, text_config
from grace_opt.solution import Solution

FORMAT, VERSION = "kv-channel-mask", 1
JSON_NAME, TENSORS_NAME = "kv_mask.json", "kv_mask.safetensors"

Keep = tuple[NDArray[np.int32], ...]
_KINDS = {"k": "key_keep", "v": "value_keep"}
_STAGES = {"key": "post_rope", "value": "v_proj_output"}


@dataclass(frozen=True, eq=False)
class KVMask:
    """Kept channels per layer and KV head, and the policy that they are meant for.

    Attributes:
        model: the base model's name. ``config_sha256`` ties the mask to its configuration (see
            `grace_opt.models.config.config_sha256`), or is None when the graphs did not say.
        num_hidden_layers, num_attention_heads: of the model, None if unknown.
        num_key_value_heads, head_dim: KV heads, and channels of a whole key.
        key_keep, value_keep: layer -> one sorted int32 array of kept channels per KV head. Keys are numbered as in
            the model's own post-RoPE key tensor, values as in v_proj's output. A layer that is absent stays whole.
        softmax_scale: the model's original one (pruning does not change it), or None for head_dim ** -0.5.
        recent_window, sinks: tokens that stay whole at the end and at the start of each row.
        prefill: ``full`` if the tokens of a prompt see each other whole, ``pruned`` if not.
        readout_scope: ``none``, ``static`` or ``prefill``. ``extra``: tensors of a static read-out, kept as they are.
        calibration, solver: who made it: from what text, by which solver, with which gap.
    """

    model: str
    num_key_value_heads: int
    head_dim: int
    key_keep: Mapping[int, Keep]
    value_keep: Mapping[int, Keep] = field(default_factory=dict)
    config_sha256: str | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    softmax_scale: float | None = None
    recent_window: int = 32
    sinks: int = 4
    prefill: str = "full"
    readout_scope: str = "none"
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("recent_window", "sinks"):
            if getattr(self, name) < 0:
                raise InputError(f"the mask's {name} must not be negative, got {getattr(self, name)}")
        if self.prefill not in ("full", "pruned"):
            raise InputError(f"the mask's prefill policy must be 'full' or 'pruned', got {self.prefill!r}")
        if self.readout_scope not in SCOPES:
            raise InputError(f"the read-out scope must be none, static or prefill, got {self.readout_scope!r}")
        for kind, keeps in (("key", self.key_keep), ("value", self.value_keep)):
            for layer, keep in keeps.items():
                self._check_layer(kind, layer, keep)

    def _check_layer(self, kind: str, layer: int, keep: Keep) -> None:
        where = f"the mask's {kind} channels of layer {layer}"
        if layer < 0 or (self.num_hidden_layers is not None and layer >= self.num_hidden_layers):
            raise InputError(f"{where}: the model has {self.num_hidden_layers} layers")
        if len(keep) != self.num_key_value_heads:
            raise InputError(f"{where} are for {len(keep)} KV heads, and the model has {self.num_key_value_heads}")
        for head, kept in enumerate(keep):
            if len(kept) and not (kept[0] >= 0 and kept[-1] < self.head_dim and (np.diff(kept) > 0).all()):
                raise InputError(
                    f"{where}, KV head {head}: kept channels must be sorted, distinct and in 0..{self.head_dim - 1}"
                )

    @property
    def layer_count(self) -> int:
        """How many layers there are, as far as the mask says."""
        return self.num_hidden_layers or 1 + max([*self.key_keep, *self.value_keep], default=-1)

    def check_model(self, config: Any, name: str) -> None:
        """Raise InputError if the mask was made for a model of another configuration than ``config``."""
        text = text_config(config)
        this = name or str(text.model_type)
        wrong = f"this mask was made for {self.model!r}, not for {this!r}"
        if self.config_sha256 is not None and self.config_sha256 != config_sha256(config):
            raise InputError(f"{wrong} (the configurations differ); make a mask for {this!r}")
        layers = text.num_hidden_layers
        if self.layer_count > layers:
            raise InputError(f"{wrong}: it has a layer {self.layer_count - 1}, and the model has {layers} layers")
        dim = head_dim(config)
        if dim is not None and dim != self.head_dim:
            raise InputError(f"{wrong}: it is for keys of {self.head_dim} channels, and these have {dim}")

    def static_readout(self, kind: str, layer: int, kv_head: int) -> Readout:
        """The static read-out of a head. Raises InputError if the mask has none, or one of another shape."""
        name = _readout_name(kind, layer, kv_head)
        keep = (self.key_keep if kind == "key" else self.value_keep)[layer][kv_head]
        matrix, constant = self.extra.get(f"{name}.matrix"), self.extra.get(f"{name}.constant")
        if matrix is None or constant is None or matrix.shape != (len(constant), len(keep)):
            raise InputError(f"the mask's static read-out {name} is missing or does not fit its channels; solve again")
        return Readout(constant.astype(np.float64), matrix.astype(np.float64))

    def keep_matrix(self, kind: str = "key") -> NDArray[np.bool_]:
        """bool[layers, KV heads, head_dim]: True where a channel is kept; absent layers are all True."""
        keeps = self.key_keep if kind == "key" else self.value_keep
        matrix = np.ones((self.layer_count, self.num_key_value_heads, self.head_dim), bool)
        for layer, keep in keeps.items():
            for head, kept in enumerate(keep):
                matrix[layer, head] = False
                matrix[layer, head, kept] = True
        return matrix


def mask_from_solutions(
    bundle: GraphBundle,
    solutions: Sequence[Solution],
    *,
    recent_window: int | None = None,
    sinks: int | None = None,
    readout: str = "none",
) -> KVMask:
    """The mask of a solved bundle (its heads and the solutions in the same order).

    ``recent_window`` and ``sinks`` default to those that the graphs were made with. ``readout`` is the scope of the
    read-out: ``none``, ``prefill`` (to be fitted to each prompt) or ``static`` (fitted now to the bundle's moments). A
    layer of which the bundle holds only some KV heads, or a head without a solution, raises InputError.
    """
    keeps: dict[str, dict[int, dict[int, NDArray[np.int32]]]] = {"key": {}, "value": {}}
    for head, solution in zip(bundle.heads, solutions, strict=True):
        if solution.pruned is None:
            raise InputError(f"{head.name} has no solution ({solution.status}: {'; '.join(solution.warnings)})")
        kept = np.setdiff1d(np.arange(solution.n), solution.pruned).astype(np.int32)
        keeps[head.kind].setdefault(head.layer, {})[head.kv_head] = kept
    heads = bundle.integer("num_key_value_heads", 1 + max(head.kv_head for head in bundle.heads))
    dims = {len(head.weights) for head in bundle.heads}
    extra = _static_readouts(bundle, keeps) if readout == "static" else {}
    if len(dims) > 1:
        raise InputError(f"the bundle's heads have {sorted(dims)} channels; a mask needs them all of one size")
    for kind, layers in keeps.items():
        for layer, by_head in layers.items():
            if sorted(by_head) != list(range(heads)):
                raise InputError(
                    f"the bundle holds {kind} graphs of KV heads {sorted(by_head)} of {heads} in layer {layer}"
                )
    first = solutions[0]
    gaps = [solution.gap for solution in solutions]
    about = {key: value for key, value in bundle.metadata.items() if key not in ("format", "version")}
    return KVMask(
        model=about.get("model", "unknown"),
        config_sha256=about.get("config_sha256"),
        num_hidden_layers=bundle.integer("num_hidden_layers", 0) or None,
        num_attention_heads=bundle.integer("num_attention_heads", 0) or None,
        num_key_value_heads=heads,
        head_dim=dims.pop(),
        key_keep={layer: tuple(by[h] for h in sorted(by)) for layer, by in keeps["key"].items()},
        value_keep={layer: tuple(by[h] for h in sorted(by)) for layer, by in keeps["value"].items()},
        softmax_scale=float(about["softmax_scale"]) if "softmax_scale" in about else None,
        recent_window=bundle.integer("recent_window", 32) if recent_window is None else recent_window,
        sinks=bundle.integer("sinks", 4) if sinks is None else sinks,
        readout_scope=readout,
        extra=extra,
        calibration=about,
        solver={
            "name": first.solver,
            "version": first.solver_version,
            "options": dict(first.options),
            "objective_sum": math.fsum(solution.objective for solution in solutions),
            "max_gap": max(gaps) if all(map(math.isfinite, gaps)) else None,
            "bound_kinds": sorted({solution.bound_kind.value for solution in solutions}),
        },
    )


def _static_readouts(
    bundle: GraphBundle, keeps: Mapping[str, Mapping[int, Mapping[int, NDArray[np.int32]]]]
) -> dict[str, np.ndarray]:
    """Tensors of read-outs fitted to the bundle: matrix float32[n - d, d] and constant float32[n - d] of each head."""
    tokens = bundle.integer("window", 0) - bundle.integer("sinks", 0) - bundle.integer("recent_window", 0)
    if tokens < 1:
        raise InputError("the bundle does not say how many tokens its windows have; calibrate again")
    tensors = {}
    for head in bundle.heads:
        about = bundle_moments(head, tokens, MIXING[head.kind])
        each = fit(about, keeps[head.kind][head.layer][head.kv_head])
        tensors[f"{_readout_name(head.kind, head.layer, head.kv_head)}.matrix"] = each.matrix.astype(np.float32)
        tensors[f"{_readout_name(head.kind, head.layer, head.kv_head)}.constant"] = each.constant.astype(np.float32)
    return tensors


def _readout_name(kind: str, layer: int, kv_head: int) -> str:
    return f"layers.{layer}.{kind[0]}.kv_heads.{kv_head}.readout"


def save_mask(mask: KVMask, folder: str | Path) -> None:
    """Write ``kv_mask.json`` and ``kv_mask.safetensors``; the JSON, which holds the other's sha256, comes last."""
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = dict(mask.extra)
    for letter, attribute in _KINDS.items():
        for layer, keep in getattr(mask, attribute).items():
            if len({len(kept) for kept in keep}) == 1:
                tensors[f"layers.{layer}.{letter}.keep"] = np.stack(keep).astype(np.int32)
            else:
                tensors[f"layers.{layer}.{letter}.keep"] = np.concatenate(keep).astype(np.int32)
                tensors[f"layers.{layer}.{letter}.offsets"] = np.cumsum([0, *map(len, keep)], dtype=np.int32)
    description = _describe(mask)
    # Both files are whole before either gets its name; contexts end inside out, so the tensors are renamed first.
    with replacing(folder / JSON_NAME) as json_file, replacing(folder / TENSORS_NAME) as tensor_file:
        write_safetensors(tensor_file, tensors, {"kv_mask": json.dumps(description, allow_nan=False)})
        digest = hashlib.sha256(tensor_file.read_bytes()).hexdigest()
        description["tensors"] = {"file": TENSORS_NAME, "sha256": digest, "names": "layers.{i}.{k|v}.{keep|offsets}"}
        json_file.write_text(json.dumps(description, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_mask(folder: str | Path) -> KVMask:
    """Read and check a mask. Raises InputError naming what is missing, damaged or out of range."""
    folder = Path(folder)
    path = folder / JSON_NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no mask (no {JSON_NAME}); make one with grace-opt solve")
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{path} is not a mask (its format is not {FORMAT!r})")
    if description.get("version") != VERSION:
        raise InputError(
            f"{path} is a mask of version {description.get('version')!r}; this grace-opt reads version {VERSION}"
        )
    try:
        tensors_path = folder / Path(description["tensors"]["file"]).name
        tensors, _ = read_safetensors(tensors_path)
        if hashlib.sha256(tensors_path.read_bytes()).hexdigest() != description["tensors"]["sha256"]:
            raise InputError(
                f"{tensors_path} is not the file that {path.name} belongs to (sha256 differs); solve again"
            )
        return _mask(description, tensors)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{path} lacks a field or has one of the wrong type ({error}); make the mask again") from None


def _describe(mask: KVMask) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    for index in range(mask.layer_count):
        entry: dict[str, Any] = {"index": index}
        for letter, attribute in _KINDS.items():
            if index in getattr(mask, attribute):
                widths = [len(kept) for kept in getattr(mask, attribute)[index]]
                entry[f"{letter}_dim"] = widths[0] if len(set(widths)) == 1 else widths
        layers.append(entry if len(entry) > 1 else {"index": index, "skip": True})
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_model": {"id": mask.model, "revision": None, "config_sha256": mask.config_sha256},
        "geometry": {
            "num_hidden_layers": mask.num_hidden_layers,
            "num_attention_heads": mask.num_attention_heads,
            "num_key_value_heads": mask.num_key_value_heads,
            "head_dim": mask.head_dim,
        },
        "key": {
            "stage": _STAGES["key"],
            "numbering": "model",
            "align": 1,
            "structure": "channel",
            "count": _count(mask.key_keep),
        },
        "value": {
            "stage": _STAGES["value"],
            "numbering": "model",
            "align": 1,
            "structure": "channel",
            "count": _count(mask.value_keep),
        },
        "softmax_scale": mask.softmax_scale,
        "policy": {
            "recent_window": mask.recent_window,
            "sink_tokens": mask.sinks,
            "prefill": mask.prefill,
            "full_iff": "same prompt or chunk, or query_pos - key_pos < recent_window, or key among the row's first "
            "sink_tokens real tokens",
        },
        "readout": {"scope": mask.readout_scope},
        "layers": layers,
        "calibration": dict(mask.calibration),
        "solver": dict(mask.solver),
    }


def _count(keeps: Mapping[int, Keep]) -> str:
    """How widths vary: ``none`` (nothing pruned), ``uniform``, ``per_layer``, or ``ragged`` (within a layer)."""
    per_layer = [{len(kept) for kept in keep} for keep in keeps.values()]
    if any(len(widths) > 1 for widths in per_layer):
        return "ragged"
    return "none" if not per_layer else "uniform" if len(set.union(*per_layer)) == 1 else "per_layer"


def _mask(description: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> KVMask:
    geometry, policy = description["geometry"], description["policy"]
    for kind, stage in _STAGES.items():
        if (description[kind]["stage"], description[kind]["structure"]) != (stage, "channel"):
            raise InputError(
                f"the mask's {kind} channels are of stage {description[kind]['stage']!r} and structure "
                f"{description[kind]['structure']!r}; only {stage!r} and 'channel' can be read"
            )
    named = {
        f"layers.{e['index']}.{letter}.keep" for e in description["layers"] for letter in _KINDS if f"{letter}_dim" in e
    }
    held = {name for name in tensors if name.endswith(".keep")}
    if named != held or len({entry["index"] for entry in description["layers"]}) != len(description["layers"]):
        raise InputError(
            f"the mask's list of layers does not match its tensors ({sorted(named ^ held)}); make it again"
        )
    keeps: dict[str, dict[int, Keep]] = {letter: {} for letter in _KINDS}
    for entry in description["layers"]:
        for letter in _KINDS:
            if f"{letter}_dim" in entry:
                keep = _keep(tensors, f"layers.{entry['index']}.{letter}")
                widths = [len(kept) for kept in keep]
                if entry[f"{letter}_dim"] not in (widths[0], widths) or (len(set(widths)) > 1) != isinstance(
                    entry[f"{letter}_dim"], list
                ):
                    raise InputError(
                        f"the mask's layer {entry['index']} should keep {entry[f'{letter}_dim']} channels and its "
                        f"tensor keeps {widths}; make the mask again"
                    )
                keeps[letter][int(entry["index"])] = keep
    return KVMask(
        model=str(description["base_model"]["id"]),
        config_sha256=description["base_model"]["config_sha256"],
        num_hidden_layers=geometry["num_hidden_layers"],
        num_attention_heads=geometry["num_attention_heads"],
        num_key_value_heads=geometry["num_key_value_heads"],
        head_dim=geometry["head_dim"],
        key_keep=keeps["k"],
        value_keep=keeps["v"],
        softmax_scale=description["softmax_scale"],
        recent_window=policy["recent_window"],
        sinks=policy["sink_tokens"],
        prefill=policy["prefill"],
        readout_scope=description["readout"]["scope"],
        extra={name: array for name, array in tensors.items() if not name.endswith((".keep", ".offsets"))},
        calibration=description["calibration"],
        solver=description["solver"],
    )


def _keep(tensors: Mapping[str, np.ndarray], prefix: str) -> Keep:
    name = f"{prefix}.keep"
    keep = tensors[name]
    if not np.issubdtype(keep.dtype, np.integer):
        raise InputError(f"the mask's tensor {name} must hold whole numbers, not {keep.dtype}")
    if keep.size and not 0 <= keep.min() <= keep.max() <= np.iinfo(np.int32).max:
        raise InputError(f"the mask's tensor {name} holds channel {keep.max()}, which is out of range; make it again")
    if keep.ndim == 2:
        return tuple(keep.astype(np.int32))
    offsets = tensors.get(f"{prefix}.offsets")
    if keep.ndim != 1 or offsets is None or offsets[0] != 0 or offsets[-1] != len(keep) or (np.diff(offsets) < 0).any():
        raise InputError(f"the mask's tensors {prefix}.keep and .offsets do not fit together; make the mask again")
    return tuple(np.split(keep.astype(np.int32), offsets[1:-1]))
