"""Tiny random models of any decoder family: large initial weights, so that logits depend on the keys."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

# What every model gets: value -> the fields that configurations have for it.
_FIELDS = {
    99: "vocab_size decoder_vocab_size vocab_size_per_layer_input",
    64: "hidden_size d_model n_embd hidden_dim embedding_size embedding_dim emb_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size",
    96: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner dim_ff "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp "
    "shared_intermediate_size dense_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size",
    32: "kv_lora_rank q_lora_rank o_lora_rank shape_embed_dim pronunciation_embed_dim",
    16: "head_dim v_head_dim kv_channels dim_head d_head hidden_size_per_layer_input qk_nope_head_dim qk_rope_head_dim "
    "index_head_dim indexer_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim rotary_dim "
    "global_head_dim",
    # short, so that a tiny prompt meets them
    8: "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size keep_window_size "
    "floor_scale index_topk",
    4: "index_block_size num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers num_layers_per_stack decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
    "linear_num_key_heads index_topk_blocks num_experts_per_tok moe_k moe_topk eos_token_id",
    256: "max_position_embeddings n_positions max_seq_len model_max_length max_target_positions context_length",
    1: "bos_token_id n_group topk_group num_expert_group",
    0.3: "initializer_range init_std",
    0: "pad_token_id",
}
SMALL = {name: value for value, names in _FIELDS.items() for name in names.split()}
_ALWAYS = {"num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}  # default None or not
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}

# The families that every test of the runtime runs, and what they need beyond SMALL: GQA unless said otherwise.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},  # QK norm
    "Gemma": {"head_dim": 32, "num_key_value_heads": 1},  # MQA, head_dim not hidden / heads
    "Gemma3Text": {},  # a sliding-window layer and a full one
    "Phi3": {"sliding_window": None},
    "Olmo2": {},  # norm over the whole key projection
    "Granite": {},  # a softmax scale of its own
    "Cohere": {},  # interleaved RoPE
    "StableLm": {},  # partial RoPE
    "GPTNeoX": {},  # MHA, fused QKV
    "Starcoder2": {"sliding_window": None},
    "SmolLM3": {"sliding_window": None},  # layers without RoPE
    "Glm4": {},
    "Mixtral": {"num_local_experts": 2, "sliding_window": None},
    "OPT": {},  # MHA, no RoPE at all
}

# What other families need to be built tiny, or to have the layers that their released models have.
_MIXED = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]
_PART = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
_PART |= {name: SMALL[name] for name in ("num_attention_heads", "max_position_embeddings", "initializer_range")}
_PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SOUNDS = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16}
_SWA_MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}
_OTHERS: dict[str, dict[str, Any]] = {
    "Bamba": {"attn_layer_indices": [1], **_MAMBA},
    "CohereCompass": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "Dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "DeepseekV2": {"num_experts_per_tok": 2},
    "Dots1": {"layer_types": _MIXED, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3Note": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        **{f"swa_{name}": value for name, value in _SWA_MLA.items()},
    },
    "FalconH1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "Fuyu": {"text_config": {"model_type": "persimmon", **_PART}},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3n": {"num_hidden_layers": 4, "layer_types": _MIXED * 2, "num_kv_shared_layers": 2},
    "Gemma4": {"global_head_dim": 32},
    "Gemma4Unified": {"global_head_dim": 32},
    "Git": {"vision_config": {**_PICTURES, "image_size": 32}},
    "GraniteMoeHybrid": {"layer_types": _LINEAR, **_MAMBA},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Laguna": {"layer_types": _MIXED},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlash": {"zero_expert_num": 2},
    "Mamba2": {"num_heads": 8},
    "Mellum": {"layer_types": _MIXED},
    "MiniMaxM3VL": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "Ministral": {"layer_types": _MIXED},
    "NemotronH": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16},
    "Phi4Multimodal": {
        "vision_config": _PICTURES,
        "audio_config": {**_SOUNDS, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
    },
    "Qwen4Exp": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4},
    "RecurrentGemma": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_hashes": 1}
    | {"attention_head_size": 16, "feed_forward_size": 96},
    "RoCBert": {"shape_vocab_size": 99, "pronunciation_vocab_size": 99},
    "Xmod": {"default_language": "en_XX"},
    "Zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "Zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "Zaya": {"num_experts_per_tok": 1},
}


def model_class(family: str) -> Any:
    """The class of a family, by its full name or its configuration's: LlamaForCausalLM, Llama, Gemma3Text."""
    for name in (family, f"{family}ForCausalLM", f"{family.removesuffix('Text')}ForCausalLM"):
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise LookupError(family)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family in evaluation mode, float32: one layer of each kind, or two if all are of one kind."""
    cls = model_class(family)
    config = cls.config_class
    own = {**FAMILIES, **_OTHERS}.get(family.removesuffix("ForCausalLM"), {})
    options = {**_small(config), **own, **overrides}
    torch.manual_seed(seed)
    return cls(config(**options)).eval()


def _small(config: Any) -> dict[str, Any]:
    """SMALL for a configuration class: the fields that it has and does not leave empty, and one layer of each kind."""
    fields = inspect.signature(config).parameters
    options = {
        name: value
        for name, value in SMALL.items()
        if name in fields and (fields[name].default is not None or name in _ALWAYS)
    }
    if "is_decoder" in fields:
        options["is_decoder"] = True
    if options.get("kv_lora_rank"):
        options["num_key_value_heads"] = options["num_attention_heads"]
    try:
        kinds = list(dict.fromkeys(config().layer_types))
    except Exception:  # it has no layer_types, or cannot be made without arguments
        kinds = []
    if len(kinds) > 1 and "layer_types" in fields:
        options |= {"layer_types": kinds} | {name: len(kinds) for name in _LAYERS if name in fields}
    return options


class ByteTokenizer:
    """The least that calibration asks of a tokenizer."""

    bos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte % 90 for byte in text.encode()]}
