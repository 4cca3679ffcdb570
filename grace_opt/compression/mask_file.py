"""The mask on disk: ``kv_mask.json`` and ``kv_mask.safetensors`` (docs/formats.md). Versions 2 and, to read, 1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grace_opt.compression.budget import Budget
from grace_opt.compression.codec import Codec
from grace_opt.compression.mask import KVMask, channels_of, checked_channels
from grace_opt.compression.mask_fields import keep_of, text, whole
from grace_opt.compression.mask_version_1 import from_version_1
from grace_opt.compression.method import Windows, from_options
from grace_opt.compression.plan import CachePlan, Choice, LayerPlan
from grace_opt.compression.plugins import CODECS
from grace_opt.compression.readout import Readout, ReadoutRecipe
from grace_opt.compression.tokens.base import TokenRule, policy_named
from grace_opt.errors import InputError, shown
from grace_opt.files import file_sha256, json_text, replacing, write_safetensors
from grace_opt.heads import CHANNELS, KINDS, Kind, check_geometry
from grace_opt.reading import read_json
from grace_opt.tensor_file import tensor_file

FORMAT, VERSION = "kv-channel-mask", 2
JSON_NAME, TENSORS_NAME = "kv_mask.json", "kv_mask.safetensors"
STAGES = {"key": "post_rope", "value": "v_proj_output"}
FULL_IFF = (
    "same prompt or chunk, or query_pos - key_pos < recent_window (with generated = keep, also key_pos >= "
    "prompt_length - recent_window), or key among the row's first sinks real tokens"
)
_FIELDS = {  # of both versions
    *("format", "version", "base_model", "geometry", "key", "value", "softmax_scale", "policy", "layers"),
    *("calibration", "solver", "tensors", "readout"),
}


def save_mask(mask: KVMask, folder: str | Path) -> None:
    """Write ``kv_mask.json`` and ``kv_mask.safetensors``; the JSON, which holds the other's sha256, comes last."""
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    for layer in mask.plan:
        for kind, codecs in layer.codecs.items():
            tensors |= _tensors(f"layers.{layer.index}.{kind[0]}", codecs)
    description = _describe(mask)
    # Both files are whole before either gets its name; contexts end inside out, so the tensors are renamed first.
    with replacing(folder / JSON_NAME) as json_file, replacing(folder / TENSORS_NAME) as tensors_file:
        write_safetensors(tensors_file, tensors, {"kv_mask": json_text(description)})
        description["tensors"] = {"file": TENSORS_NAME, "sha256": file_sha256(tensors_file)}
        json_file.write_text(json_text(description, indent=1) + "\n", encoding="utf-8")


def load_mask(folder: str | Path) -> KVMask:
    """Read and check a mask. Raises InputError naming what is missing, damaged, unknown or out of range."""
    folder = Path(folder)
    path = folder / JSON_NAME
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = True  # reading it says why it cannot be looked at
    if not there:
        raise InputError(f"{folder} holds no mask (no {JSON_NAME}); make one with grace-opt solve")
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{path} is not a mask (its format is not {FORMAT!r})")
    version = description.get("version")
    if version not in (1, VERSION) or type(version) is not int:
        raise InputError(
            f"{path} is a mask of version {version!r}; this grace-opt reads versions 1 and {VERSION}; use a newer one"
        )
    try:
        tensors_path = folder / Path(description["tensors"]["file"]).name
        with tensor_file(tensors_path) as tensors:
            if file_sha256(tensors_path) != description["tensors"]["sha256"]:
                raise InputError(
                    f"{tensors_path} is not the file that {path.name} belongs to (sha256 differs); solve again"
                )
            return _mask(*(from_version_1(description, tensors) if version == 1 else (description, tensors)))
    except InputError:
        raise
    except Exception as error:  # what is wrong with a description surfaces as almost any type, in codecs of others too
        reason = shown(str(error) or type(error).__name__, 200)
        raise InputError(f"{path} lacks a field or has one of the wrong type ({reason}); make the mask again") from None


# ---------------------------------------------------------------- writing


def _describe(mask: KVMask) -> dict[str, Any]:
    policies = {layer.index: _policy(layer) for layer in mask.plan}
    first = next(iter(policies.values()), _policy(LayerPlan(0)))
    layers: list[dict[str, Any]] = []
    for index in range(mask.layer_count):
        entry: dict[str, Any] = {"index": index}
        if index in mask.plan.layers:
            entry |= {kind: _codec_entry(codecs) for kind, codecs in mask.plan.layers[index].codecs.items()}
            if policies[index] != first:
                entry["policy"] = policies[index]
        else:
            entry["skip"] = True
        layers.append(entry)
    sides: dict[str, Any] = {
        kind: {"stage": STAGES[kind], "numbering": "model", "align": mask.align, "structure": mask.structure}
        | {"count": _count(mask.plan, kind)}
        for kind in KINDS
    }
    return {
        **mask.unknown,
        "format": FORMAT,
        "version": VERSION,
        "base_model": {"id": mask.model, "revision": None, "config_sha256": mask.config_sha256},
        "geometry": {
            "num_hidden_layers": mask.num_hidden_layers,
            "num_attention_heads": mask.num_attention_heads,
            "num_key_value_heads": mask.num_key_value_heads,
            "head_dim": mask.head_dim,
        },
        **sides,
        "softmax_scale": mask.softmax_scale,
        "policy": {**first, "prefill": mask.prefill, "full_iff": FULL_IFF},
        "layers": layers,
        "calibration": dict(mask.calibration),
        "solver": dict(mask.solver),
    }


def _policy(layer: LayerPlan) -> dict[str, Any]:
    """All of a layer's plan but its codecs."""
    rule, choice = layer.tokens, layer.choice
    return {
        **asdict(layer.windows),
        "readout": None if layer.readout is None else asdict(layer.readout),
        "queries": layer.queries,
        "spans": layer.spans,
        "tokens": None
        if rule is None
        else {"policy": rule.policy.name, "share": rule.share, "parameters": rule.policy.parameters()},
        "choice": None
        if choice is None
        else {
            "method": choice.method.options(),
            "ratio": choice.budget.ratio,
            "value_ratio": choice.budget.value_ratio,
        },
    }


def _codec_entry(codecs: Sequence[Codec]) -> dict[str, Any]:
    """Codec and parameters; those of each head where they differ."""
    each = [_codec_parameters(codec) for codec in codecs]
    return each[0] if all(other == each[0] for other in each) else {"heads": each}


def _codec_parameters(codec: Codec) -> dict[str, Any]:
    inner = {"inner": _codec_parameters(codec.inner)} if hasattr(codec, "inner") else {}
    return {"codec": codec.name, **codec.parameters(), **inner}


def _tensors(prefix: str, codecs: Sequence[Codec]) -> dict[str, np.ndarray]:
    """Kept channels of all heads in one tensor; all other tensors by head and field."""
    tensors: dict[str, np.ndarray] = {}
    kept = [channels_of(codec) for codec in codecs]
    if all(each is not None for each in kept):
        keeps = [each.keep.numpy().astype(np.int32) for each in kept if each is not None]
        if len({len(keep) for keep in keeps}) == 1:
            tensors[f"{prefix}.keep"] = np.stack(keeps)
        else:
            tensors[f"{prefix}.keep"] = np.concatenate(keeps)
            tensors[f"{prefix}.offsets"] = np.cumsum([0, *map(len, keeps)], dtype=np.int32)
    for head, codec in enumerate(codecs):
        for name, tensor in codec.tensors().items():
            if not name.endswith("order") or channels_of(codec) is None:
                tensors[f"{prefix}.kv_heads.{head}.{name.removeprefix('inner.')}"] = tensor.cpu().numpy()
    return tensors


def _count(plan: CachePlan, kind: Kind) -> str:
    """How widths vary: ``none`` (nothing compressed), ``uniform``, ``per_layer``, or ``ragged`` (within a layer)."""
    per_layer = [set(widths) for widths in plan.widths(kind).values()]
    if any(len(widths) > 1 for widths in per_layer):
        return "ragged"
    return "none" if not per_layer else "uniform" if len(set.union(*per_layer)) == 1 else "per_layer"


# ---------------------------------------------------------------- reading


def _mask(description: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> KVMask:
    geometry = description["geometry"]
    entries = description["layers"]
    count = geometry["num_hidden_layers"]
    heads, n = whole(geometry["num_key_value_heads"], "num_key_value_heads"), whole(geometry["head_dim"], "head_dim")
    check_geometry("the mask", len(entries), heads, n)
    if count is not None and whole(count, "num_hidden_layers") != len(entries):
        raise InputError(f"the mask says {count} layers and lists {len(entries)}; make it again")
    if [entry["index"] for entry in entries] != list(range(len(entries))):
        raise InputError("the mask's list of layers is not numbered from 0 on; make it again")
    for kind, stage in STAGES.items():
        if description[kind]["stage"] != stage:
            raise InputError(
                f"the mask's {kind} channels are of stage {description[kind]['stage']!r}; only {stage!r} can be read"
            )
    policy = description["policy"]
    used: set[str] = set()
    of_heads: dict[str, dict[str, str]] = {}  # prefix of a head's tensors -> field -> whole name
    for name in tensors:
        found = re.fullmatch(r"(layers\.[0-9]+\.[kv]\.kv_heads\.[0-9]+)\.(.+)", name, re.DOTALL)
        if found:
            of_heads.setdefault(found[1], {})[found[2]] = name
    layers = {}
    for entry in entries:
        if entry.get("skip"):
            continue
        index = entry["index"]
        codecs = {
            kind: _codecs(
                entry[kind], f"layers.{index}.{kind[0]}", heads, n if kind == "key" else None, tensors, of_heads, used
            )
            for kind in KINDS
            if kind in entry
        }
        layers[index] = _layer(index, codecs, {**policy, **entry.get("policy", {})})
    held = {name for name in tensors if name not in used}
    if held:
        names = ", ".join(shown(name, 80) for name in sorted(held)[:4])
        raise InputError(f"the mask's list of layers does not match its tensors ({names}); make it again")
    base, attention_heads = description["base_model"], geometry["num_attention_heads"]
    return KVMask(
        model=text(base["id"], "base_model.id"),
        config_sha256=None if base["config_sha256"] is None else text(base["config_sha256"], "config_sha256"),
        num_hidden_layers=count,
        num_attention_heads=None if attention_heads is None else whole(attention_heads, "num_attention_heads"),
        num_key_value_heads=heads,
        head_dim=n,
        plan=CachePlan(layers),
        softmax_scale=description["softmax_scale"],
        prefill=policy["prefill"],
        structure=description["key"]["structure"],
        align=whole(description["key"]["align"], "align"),
        calibration=dict(description["calibration"]),
        solver=dict(description["solver"]),
        unknown={name: value for name, value in description.items() if name not in _FIELDS},
    )


def _layer(index: int, codecs: Mapping[Kind, Sequence[Codec]], policy: Mapping[str, Any]) -> LayerPlan:
    tokens, choice, readout = policy["tokens"], policy["choice"], policy["readout"]
    rule = None
    if tokens is not None:
        rule = TokenRule(policy_named(tokens["policy"], tokens["parameters"]), float(tokens["share"]))
    chosen = None
    if choice is not None:
        chosen = Choice(from_options(choice["method"]), Budget(choice["ratio"], choice["value_ratio"]))
    return LayerPlan(
        index,
        codecs,
        Windows(whole(policy["sinks"], "sinks"), whole(policy["recent_window"], "recent_window"), policy["generated"]),
        None if readout is None else ReadoutRecipe(**readout),
        whole(policy["queries"], "queries"),
        None if policy["spans"] is None else whole(policy["spans"], "spans"),
        rule,
        chosen,
    )


def _codecs(
    entry: Mapping[str, Any],
    prefix: str,
    heads: int,
    n: int | None,
    tensors: Mapping[str, np.ndarray],
    of_heads: Mapping[str, Mapping[str, str]],
    used: set[str],
) -> list[Codec]:
    """The codecs of one layer's heads. ``used`` collects the names of tensors that belong to something."""
    each, innermost = entry.get("heads"), _innermost(entry)
    if "kv_heads" in innermost:  # rows of all heads
        if whole(innermost["kv_heads"], "kv_heads") != heads:
            raise InputError(f"the mask's {prefix} is for {innermost['kv_heads']} KV heads, and the model has {heads}")
        joint = _codec(entry, f"{prefix}.kv_heads.0", n, None, tensors, of_heads, used)
        if any(tensor.dim() > 2 or not tensor.is_floating_point() for tensor in joint.tensors().values()):
            raise InputError(f"the mask's {prefix} has tensors that are no matrices of real numbers; make it again")
        return [joint]
    if each is None:
        held = keep_of(tensors, prefix, None, used) if _innermost(entry)["codec"] == "channels" else None
        each = [entry] * (heads if held is None else len(held))
    else:
        held = keep_of(tensors, prefix, len(each), used) if _innermost(each[0])["codec"] == "channels" else None
    if len(each) != heads or (held is not None and len(held) != heads):
        raise InputError(f"the mask's {prefix} is for {len(each)} KV heads, and the model has {heads}; make it again")
    return [
        _codec(about, f"{prefix}.kv_heads.{head}", n, None if held is None else held[head], tensors, of_heads, used)
        for head, about in enumerate(each)
    ]


def _innermost(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return _innermost(entry["inner"]) if "inner" in entry else entry


def _codec(
    about: Mapping[str, Any],
    prefix: str,
    n: int | None,
    keep: np.ndarray | None,
    tensors: Mapping[str, np.ndarray],
    of_heads: Mapping[str, Mapping[str, str]],
    used: set[str],
) -> Codec:
    name = about["codec"]
    parameters = {field: value for field, value in about.items() if field not in ("codec", "inner")}
    made = CODECS[name]
    if "inner" in about:
        inner: Any = {"inner": _codec(about["inner"], prefix, n, keep, tensors, of_heads, used)}
        return made(**inner, **parameters)
    fields = {field: tensors[whole] for field, whole in of_heads.get(prefix, {}).items()}
    used |= set(of_heads.get(prefix, {}).values())
    for each, array in fields.items():
        if array.dtype.kind == "c" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
            raise InputError(f"the mask's tensor {prefix}.{each} holds numbers that are not finite or not real")
    if name != "channels":
        codec = made(**parameters, **{each: torch.from_numpy(array) for each, array in fields.items()})
        if whole(codec.n, f"{prefix} channels") > CHANNELS or (n is not None and codec.n not in (0, n)):
            raise InputError(
                f"the mask's {prefix} is for {codec.n} channels, and the model's heads have {n or 'up to 4096'}; make "
                "it again"
            )
        return codec
    assert keep is not None
    readout = None
    if fields:
        constant = fields["constant"].astype(np.float64)
        matrix = fields.get("matrix", np.zeros((len(constant), len(keep)), np.float32))
        readout = Readout(constant, matrix.astype(np.float64))
    if parameters["width"] != len(keep):
        raise InputError(
            f"the mask's {prefix} should keep {parameters['width']} channels and its tensor keeps {len(keep)}; make "
            "the mask again"
        )
    size = n if n is not None else len(keep) + (len(readout.constant) if readout else parameters["n"] - len(keep))
    channels = checked_channels(keep, size, readout, f"the mask's {prefix}")
    return channels if "matrix" in fields else replace(channels, matrix=None)
