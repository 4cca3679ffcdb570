"""Masks of version 1: what they say, in the words of version 2 (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from grace_opt.compression.mask_fields import keep_of
from grace_opt.compression.readout import READOUT_SCOPES, ReadoutRecipe
from grace_opt.errors import InputError
from grace_opt.heads import KINDS


def from_version_1(
    description: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A description and tensors of version 2 that say the same; what version 1 left to its runtime is said here."""
    n, scope = description["geometry"]["head_dim"], description["readout"]["scope"]
    if scope not in READOUT_SCOPES:
        raise InputError(f"the read-out scope must be none, static or prefill, got {scope!r}")
    layers = []
    for old in description["layers"]:
        entry: dict[str, Any] = {"index": old["index"]}
        for kind in KINDS:
            width = old.get(f"{kind[0]}_dim")
            if isinstance(width, list):
                entry[kind] = {"heads": [{"codec": "channels", "width": each, "n": n} for each in width]}
            elif width is not None:
                entry[kind] = {"codec": "channels", "width": width, "n": n}
        layers.append(entry if len(entry) > 1 else {"index": old["index"], "skip": True})
    old = description["policy"]
    policy = {
        "sinks": old["sink_tokens"],
        "recent_window": old["recent_window"],
        "generated": "prune",
        "readout": asdict(ReadoutRecipe()) if scope == "prefill" else None,
        "queries": 32,
        "spans": 2,
        "tokens": None,
        "choice": None,
        "prefill": old["prefill"],
    }
    if scope == "static":
        _check_static(layers, tensors)
    renamed = {name.replace(".readout.", "."): array for name, array in tensors.items()}
    return {**description, "layers": layers, "policy": policy}, renamed


def _check_static(layers: Sequence[Mapping[str, Any]], tensors: Mapping[str, np.ndarray]) -> None:
    """Raise InputError if a head of version 1 has no read-out: it would silently be read as something else."""
    for entry in layers:
        for kind in KINDS:
            prefix = f"layers.{entry['index']}.{kind[0]}"
            heads = range(len(keep_of(tensors, prefix, None, set()))) if kind in entry else ()
            for name in (f"{prefix}.kv_heads.{head}.readout" for head in heads):
                if not {f"{name}.matrix", f"{name}.constant"} <= set(tensors):
                    raise InputError(f"the mask's static read-out {name} is missing; solve again")
