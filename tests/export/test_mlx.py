"""The target mlx without MLX: what it writes and refuses. tests/export/in_mlx runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_opt import InputError
from grace_opt.export.hf import folded
from grace_opt.export.run import export
from grace_opt.export.target import Source
from grace_opt.testing.exports import check_refusal
from tests.support.exports import SHORT, tiny, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0, "readout": "none"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_has_the_folded_weights_and_both_styles_of_fields(tied: bool, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    model, tokenizer = tiny(tie_word_embeddings=tied, rope_parameters=rope)
    mask = tiny_mask(model, **STOCK, values=12)
    folder = export(mask, model, tokenizer, "mlx", tmp_path / "out", **SHORT, name="a/model").folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["head_dim"], config["v_head_dim"], config["swa_v_head_dim"]) == (16, 12, 12)
    assert config["rope_theta"] == config["swa_rope_theta"] == 500.0
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 500.0
    assert config["hybrid_layer_pattern"] == [1, *[0] * (model.config.num_hidden_layers - 1)]
    assert config["sliding_window_size"] == model.config.max_position_embeddings
    weights = load_file(folder / "model.safetensors")
    state = folded(Source(mask, model, tokenizer, "a/model", None)).state_dict()  # type: ignore[arg-type]
    assert set(weights) == set(state)  # with the output matrix
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert model.config.tie_word_embeddings is tied
    ids = torch.randint(4, 99, (1, 40), generator=torch.Generator().manual_seed(3))
    again: Any = AutoModelForCausalLM.from_pretrained(folder)
    ours = folded(Source(mask, model, tokenizer, "a/model", None))  # type: ignore[arg-type]
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("w5 w6").input_ids == tokenizer("w5 w6").input_ids


@pytest.mark.parametrize(
    ("family", "overrides", "change", "said"),
    [
        ("Llama", {}, {"readout": "static"}, "cannot run static read-outs; solve with --readout none"),
        ("Llama", {}, {"recent_window": 4}, "keeps no token whole"),
        ("Llama", {"attention_bias": True}, {}, "has no biases, no scaled RoPE and silu alone"),
        ("Llama", {"num_hidden_layers": 1}, {}, "needs a layer besides that with a sliding window"),
        ("Qwen2", {}, {}, "runs models of llama, mistral, and this is a qwen2"),
    ],
)
def test_what_it_has_no_place_for_is_refused(
    family: str, overrides: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    model, _ = tiny(family, **overrides)
    assert said in check_refusal("mlx", tiny_mask(model, **{**STOCK, **change}), model.config)


def test_a_check_without_mlx_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.export.process.distribution_version", lambda name: "not installed")
    model, tokenizer = tiny()
    with pytest.raises(InputError, match="mlx-lm is not installed here"):
        export(tiny_mask(model, **STOCK), model, tokenizer, "mlx", tmp_path / "out", **SHORT, check=True)
    assert list(tmp_path.iterdir()) == []
