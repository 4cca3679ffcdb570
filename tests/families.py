"""Tiny random models of many decoder families: large initial weights, so that logits depend on the keys."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# family -> what it adds: GQA unless said otherwise
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},  # QK norm
    "Gemma": {"head_dim": 32, "num_key_value_heads": 1},  # MQA, head_dim not hidden / heads
    "Gemma3Text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "Phi3": {},
    "Olmo2": {},  # norm over the whole key projection
    "Granite": {},  # a softmax scale of its own
    "Cohere": {},  # interleaved RoPE
    "StableLm": {},  # partial RoPE
    "GPTNeoX": {"num_key_value_heads": None},  # MHA, fused QKV
    "Starcoder2": {"sliding_window": None},
    "SmolLM3": {},  # layers without RoPE
    "Glm4": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 2, "sliding_window": None},
    "OPT": {"num_key_value_heads": None, "ffn_dim": 96, "word_embed_proj_dim": 64},  # no RoPE at all
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family in evaluation mode, float32."""
    options = {**SMALL, **FAMILIES.get(family, {}), **overrides}
    options = {name: value for name, value in options.items() if value is not None or name == "sliding_window"}
    if family == "OPT":
        options["init_std"] = options.pop("initializer_range")
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(seed)
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config).eval()


class ByteTokenizer:
    """The least that calibration asks of a tokenizer."""

    bos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte % 90 for byte in text.encode()]}
