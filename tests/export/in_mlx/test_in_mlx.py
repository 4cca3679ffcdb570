"""MLX-LM itself runs what is exported for it. Run by .ci/runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_opt.errors import InputError
from grace_opt.export.process import answered
from grace_opt.export.run import export
from grace_opt.testing.exports import check_target
from tests.support.exports import SHORT, TEXTS, tiny, tiny_bpe, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0, "readout": "none"}
OF_FAMILY: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": None}}


@pytest.mark.parametrize("family", sorted(OF_FAMILY))
@pytest.mark.parametrize("kept", [12, 7])
def test_mlx_conforms(family: str, kept: int) -> None:
    model, tokenizer = tiny(family, **OF_FAMILY[family])
    check_target("mlx", tiny_mask(model, **STOCK, values=kept), model, tokenizer, TEXTS, length=60)


def test_tied_weights_and_another_base_of_rope_conform() -> None:
    model, tokenizer = tiny(
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3
    )
    check_target("mlx", tiny_mask(model, **STOCK), model, tokenizer, TEXTS, length=60)


def test_texts_are_cut_as_by_the_models_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = tiny_bpe()
    folder = export(tiny_mask(model, **STOCK), model, tokenizer, "mlx", tmp_path / "out", **SHORT).folder
    for text in ("the weather of 1212, the\n\n  12th  week", "Zeitgef\u00fchl \u2014 \u6f22\u5b57 12.12"):
        asked = {"folder": str(folder), "prompt": text, "new_tokens": 4}
        by_ids = answered("grace_opt.export.mlx_decode", asked | {"prompt": tokenizer(text).input_ids}, "MLX-LM")
        assert answered("grace_opt.export.mlx_decode", asked, "MLX-LM") == by_ids


def test_a_folder_that_it_does_not_like_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of tomorrow"}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="MLX-LM could not run what was written"):
        answered("grace_opt.export.mlx_decode", {"folder": str(tmp_path), "prompt": [4], "new_tokens": 1}, "MLX-LM")


def test_a_checked_export(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    done = export(tiny_mask(model, **STOCK), model, tokenizer, "mlx", tmp_path / "out", **SHORT, check=True)
    assert done.checked is not None
    assert done.checked.runtime.startswith("mlx-lm ")
    assert done.checked.largest is not None
    assert done.checked.largest < 1e-3
