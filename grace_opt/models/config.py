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


def config_sha256(config: Any) -> str:
    """sha256 (hex) of the fields that shape keys and queries, RoPE included; the same for most fine-tunes."""
    text = text_config(config)
    fields = {name: stated(text, name) for name in _HASHED}
    rope = getattr(text, "rope_parameters", None) or {}
    fields["rope_theta"] = rope.get("rope_theta", getattr(text, "rope_theta", None))
    fields["rope_type"], fields["rope_factor"] = rope.get("rope_type", "default"), rope.get("factor")
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
