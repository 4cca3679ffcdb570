"""The target gguf without llama.cpp: what it writes and refuses. tests/export/in_llama_cpp runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from grace_opt import InputError, KVMask
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.method import Windows
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.export.gguf import FILE
from grace_opt.export.gguf_decode import scores_of
from grace_opt.export.hf import folded
from grace_opt.export.run import export
from grace_opt.export.target import Source
from grace_opt.testing.exports import check_refusal
from tests.support.exports import SHORT, tiny, tiny_bpe, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0, "readout": "none"}


def lowrank(model: Any, width: int, mean: float) -> KVMask:
    """Values in a random basis, the other coordinates read as ``mean``."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(model.config.num_hidden_layers):
        bases = [torch.linalg.qr(torch.randn(16, 16, generator=generator))[0] for _ in range(2)]
        codecs = [LowRank(basis, torch.full((16 - width,), mean)) for basis in bases]
        layers[index] = LayerPlan(index, {"value": codecs}, Windows(0, 0, "prune"))
    return KVMask("tiny", 2, 16, CachePlan(layers), num_hidden_layers=len(layers))


def test_the_file_has_the_folded_weights_and_the_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = tiny_bpe()
    mask = tiny_mask(model, **STOCK, values=12)
    folder = export(mask, model, tokenizer, "gguf", tmp_path / "out", **SHORT, name="a/model").folder
    reader = GGUFReader(folder / FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["mimo2.attention.key_length"], fields["mimo2.attention.value_length"]) == (16, 12)
    assert fields["mimo2.attention.sliding_window"] == fields["mimo2.context_length"] == 256
    assert fields["mimo2.attention.sliding_window_pattern"] == [True, False]
    assert fields["tokenizer.ggml.pre"] == "smollm"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == model.config.vocab_size
    assert [tokens[i] for i in tokenizer("the w1").input_ids] == tokenizer.convert_ids_to_tokens(
        tokenizer("the w1").input_ids
    )
    weights = {tensor.name: tensor.data for tensor in reader.tensors}
    state = folded(Source(mask, model, tokenizer, "a/model", None)).state_dict()  # type: ignore[arg-type]
    assert len(weights) == len(state)
    assert np.array_equal(weights["blk.1.attn_v.weight"], state["model.layers.1.self_attn.v_proj.weight"].numpy())
    assert np.array_equal(weights["blk.0.attn_output.weight"], state["model.layers.0.self_attn.o_proj.weight"].numpy())


def test_any_linear_map_folds_and_an_affine_one_has_no_place(tmp_path: Path) -> None:
    model, tokenizer = tiny_bpe()
    export(lowrank(model, 9, 0.0), model, tokenizer, "gguf", tmp_path / "linear", **SHORT)
    assert (tmp_path / "linear" / FILE).stat().st_size > 0
    with pytest.raises(InputError, match=r"llama.cpp has no place for model.layers.0.self_attn.q_proj.bias, .* solve"):
        export(lowrank(model, 9, 0.5), model, tokenizer, "gguf", tmp_path / "affine", **SHORT)
    assert not (tmp_path / "affine").exists()


@pytest.mark.parametrize(
    ("family", "overrides", "change", "said"),
    [
        ("Llama", {}, {"readout": "static"}, "cannot run static read-outs; solve with --readout none"),
        ("Llama", {}, {"recent_window": 4}, "keeps no token whole"),
        ("Llama", {"attention_bias": True}, {}, "has no biases, no scaled RoPE and silu alone"),
        ("Llama", {"hidden_act": "gelu"}, {}, "has no biases, no scaled RoPE and silu alone"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, {}, "scaled RoPE"),
        ("Qwen2", {}, {}, "runs models of llama, mistral, and this is a qwen2"),
    ],
)
def test_what_it_has_no_place_for_is_refused(
    family: str, overrides: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    model, _ = tiny_bpe(family, **overrides)
    assert said in check_refusal("gguf", tiny_mask(model, **{**STOCK, **change}), model.config)


def test_a_tokenizer_that_llama_cpp_may_cut_otherwise_is_refused(tmp_path: Path) -> None:
    model, words = tiny()
    said = "is not a byte-level BPE as that of GPT-2 or SmolLM2, and might cut texts otherwise"
    with pytest.raises(InputError, match=said):
        export(tiny_mask(model, **STOCK), model, words, "gguf", tmp_path / "out", **SHORT)
    model, tokenizer = tiny_bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match=said):
        export(tiny_mask(model, **STOCK), model, tokenizer, "gguf", tmp_path / "out", **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_those_of_whole_characters() -> None:
    known = [{"id": 7, "logprob": -1.0}, {"id": 9, "logprob": -2.0}]
    assert scores_of([5, 7, 6, 8, 9], known) == [None, -1.0, None, None, -2.0]
    assert scores_of([5], []) == [None]


def test_a_check_without_llama_cpp_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.export.process.distribution_version", lambda name: "not installed")
    model, tokenizer = tiny_bpe()
    with pytest.raises(InputError, match="xllamacpp is not installed here"):
        export(tiny_mask(model, **STOCK), model, tokenizer, "gguf", tmp_path / "out", **SHORT, check=True)
    assert list(tmp_path.iterdir()) == []
