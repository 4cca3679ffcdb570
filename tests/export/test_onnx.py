"""The target onnx without ONNX: what it refuses. tests/export/in_onnx writes and runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grace_opt import InputError
from grace_opt.export.run import export
from grace_opt.testing.exports import check_refusal
from tests.support.exports import SHORT, tiny, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0, "readout": "none"}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "overrides", "change", "said"),
    [
        ("Llama", {}, {"kept": 8}, "cannot prune keys, only values"),
        ("Llama", {}, {"recent_window": 4}, "keeps no token whole"),
        ("Llama", {"rope_parameters": DYNAMIC}, {}, "has one table of RoPE's angles for all lengths"),
        ("Llama", {"hidden_act": "gelu"}, {}, "silu alone for this fold; use the target hf"),
        ("Qwen3", {}, {}, "runs models of llama, mistral, qwen2, and this is a qwen3"),
    ],
)
def test_what_it_has_no_place_for_is_refused(
    family: str, overrides: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    model, _ = tiny(family, **overrides)
    assert said in check_refusal("onnx", tiny_mask(model, **{**STOCK, **change}), model.config)


def test_an_export_without_onnx_says_so_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.export.onnx.distribution_version", lambda name: "not installed")
    model, tokenizer = tiny()
    with pytest.raises(InputError, match=r"is not installed here; install grace-opt\[onnx\]"):
        export(tiny_mask(model, **STOCK), model, tokenizer, "onnx", tmp_path / "out", **SHORT)
    assert list(tmp_path.iterdir()) == []
