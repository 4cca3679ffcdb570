"""ONNX Runtime GenAI itself runs what is exported for it. Run by .ci/runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import Document
from grace_opt.export.hf import folded
from grace_opt.export.onnx import FILE
from grace_opt.export.process import answered
from grace_opt.export.run import export
from grace_opt.export.target import Source
from grace_opt.testing.exports import check_target
from tests.support.exports import SHORT, TEXTS, tiny_bpe, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0}
OF_FAMILY: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def plain(family: str = "Llama", **overrides: Any) -> tuple[Any, Any]:
    """A tiny model with a tokenizer as that of GPT-2."""
    return tiny_bpe(family, "gpt-2", **overrides)


@pytest.mark.parametrize("family", sorted(OF_FAMILY))
@pytest.mark.parametrize("readout", ["none", "static"])
@pytest.mark.parametrize("kept", [12, 7])
def test_onnx_conforms(family: str, readout: str, kept: int) -> None:
    model, tokenizer = plain(family, **OF_FAMILY[family])
    check_target("onnx", tiny_mask(model, **STOCK, values=kept, readout=readout), model, tokenizer, TEXTS, length=60)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}])
def test_tied_weights_and_scaled_rope_conform(rope: dict[str, Any]) -> None:
    model, tokenizer = plain(tie_word_embeddings=True, rope_parameters=rope, rms_norm_eps=1e-3)
    check_target("onnx", tiny_mask(model, **STOCK), model, tokenizer, TEXTS, length=60)


def test_onnxruntime_alone_runs_the_graph_padded_and_in_parts(tmp_path: Path) -> None:
    """Its cache is inputs and outputs: a prompt in two parts, and beside it a shorter one, padded on the left."""
    from onnxruntime import InferenceSession

    model, tokenizer = plain()
    mask = tiny_mask(model, **STOCK)
    folder = export(mask, model, tokenizer, "onnx", tmp_path / "out", **SHORT).folder
    session = InferenceSession(folder / FILE)
    names = [each.name for each in session.get_outputs()]
    ids = torch.randint(4, 99, (2, 24), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(ids)
    real[1, :5] = 0
    places = (real.cumsum(1) - 1).clamp(min=0)
    caches = [each for each in session.get_inputs() if each.name.startswith("past")]
    held = {each.name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32) for each in caches}
    parts = []
    for part in (slice(0, 17), slice(17, 18), slice(18, 24)):
        fed = {"input_ids": ids[:, part], "attention_mask": real[:, : part.stop], "position_ids": places[:, part]}
        told = session.run(names, {name: each.numpy() for name, each in fed.items()} | held)
        named = dict(zip(names, told, strict=True))
        parts.append(named.pop("logits"))
        held = {name.replace("present", "past_key_values"): each for name, each in named.items()}
    logits = torch.tensor(np.concatenate(parts, axis=1))
    ours = folded(Source(mask, model, tokenizer, "a/model", None))  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.allclose(logits[0], ours(ids[:1]).logits[0], atol=1e-4)
        assert torch.allclose(logits[1, 5:], ours(ids[1:, 5:]).logits[0], atol=1e-4)


def test_texts_are_cut_as_by_the_models_tokenizer_or_the_check_says_no(tmp_path: Path) -> None:
    model, tokenizer = plain()
    folder = export(tiny_mask(model, **STOCK), model, tokenizer, "onnx", tmp_path / "out", **SHORT).folder
    for text in ("the weather of 1212, the\n\n  12th  week", "Zeitgef\u00fchl \u2014 \u6f22\u5b57", "a</s> the </s>b"):
        asked = {"folder": str(folder), "prompt": [4, 5], "new_tokens": 1, "text": text}
        assert answered("grace_opt.export.onnx_decode", asked, "GenAI")["ids"] == tokenizer(text).input_ids
    model, digits = tiny_bpe()  # whose digits stand alone, with a merge of two
    dates = {**SHORT, "texts": [Document("dates", "the 12th, " * 40, cut=True)]}
    with pytest.raises(InputError, match="makes other tokens of a text than the tokenizer of a/model"):
        export(tiny_mask(model, **STOCK), model, digits, "onnx", tmp_path / "no", **dates, name="a/model", check=True)
    assert not (tmp_path / "no").exists()


def test_a_folder_that_it_does_not_like_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"type": "of tomorrow"}}), encoding="utf-8")
    asked = {"folder": str(tmp_path), "prompt": [4], "new_tokens": 1, "text": "a"}
    with pytest.raises(InputError, match="ONNX Runtime GenAI could not run what was written"):
        answered("grace_opt.export.onnx_decode", asked, "ONNX Runtime GenAI")


def test_a_checked_export(tmp_path: Path) -> None:
    model, tokenizer = plain()
    done = export(tiny_mask(model, **STOCK), model, tokenizer, "onnx", tmp_path / "out", **SHORT, check=True)
    assert done.checked is not None
    assert done.checked.runtime.startswith("onnxruntime-genai ")
    assert done.checked.largest is not None
    assert done.checked.largest < 1e-3
