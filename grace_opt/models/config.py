"""What ties graphs and masks to a model: its attention geometry and a hash of the configuration behind it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Only what shapes keys and queries, by names that are the same in every transformers release.
_HASHED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the language model."""
    return config.get_text_config()


def stated(config: Any, name: str) -> Any:
    """A field of a configuration, None without it; a list with each layer's where layers may differ (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def context_of(config: Any) -> int | None:
    """How many tokens the model was made for; None if the configuration does not say."""
    return getattr(text_config(config), "max_position_embeddings", None)


def config_sha256(config: Any) -> str:
    """sha256 (hex) of the fields that shape keys and queries, RoPE included; the same for most fine-tunes."""
    return _sha256(config, by_kind=True)


def accepted_sha256(config: Any) -> set[str]:
    """What files may say of this configuration: version 1 left out RoPE that differs by kind of layer."""
    return {_sha256(config, by_kind=True), _sha256(config, by_kind=False)}


def _sha256(config: Any, by_kind: bool) -> str:
    text = text_config(config)
    fields: dict[str, Any] = {name: stated(text, name) for name in _HASHED}
    rope = getattr(text, "rope_parameters", None) or {}
    fields |= _rope_fields(rope, getattr(text, "rope_theta", None))
    kinds = {kind: _rope_fields(each, None) for kind, each in rope.items() if isinstance(each, dict)}
    if by_kind and kinds:
        fields["rope"] = kinds
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _rope_fields(rope: dict[str, Any], theta: Any) -> dict[str, Any]:
    return {
        "rope_theta": rope.get("rope_theta", theta),
        "rope_type": rope.get("rope_type", "default"),
        "rope_factor": rope.get("factor"),
    }


def head_dim(config: Any) -> int | None:
    """Channels of a key, as far as the configuration says."""
    text = text_config(config)
    dim = stated(text, "head_dim")
    if isinstance(dim, list):
        return None
    if dim:
        return int(dim)
    hidden, heads = stated(text, "hidden_size"), stated(text, "num_attention_heads")
    return int(hidden) // int(heads) if isinstance(hidden, int) and isinstance(heads, int) else None
