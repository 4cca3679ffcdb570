"""llama.cpp itself runs what is exported for it. Run by .ci/runtimes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from grace_opt.errors import InputError
from grace_opt.export.gguf import FILE
from grace_opt.export.process import answered
from grace_opt.export.run import export
from grace_opt.testing.exports import check_target
from tests.support.exports import SHORT, TEXTS, tiny_bpe, tiny_mask

STOCK: dict[str, Any] = {"kept": None, "recent_window": 0, "sinks": 0, "readout": "none"}
OF_FAMILY: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": None}}


@pytest.mark.parametrize("family", sorted(OF_FAMILY))
@pytest.mark.parametrize("kept", [12, 7])
def test_gguf_conforms(family: str, kept: int) -> None:
    model, tokenizer = tiny_bpe(family, ascii=True, **OF_FAMILY[family])
    check_target("gguf", tiny_mask(model, **STOCK, values=kept), model, tokenizer, TEXTS, length=60)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_texts_are_cut_as_by_the_models_tokenizer(pre: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_bpe(pre=pre)
    folder = export(tiny_mask(model, **STOCK), model, tokenizer, "gguf", tmp_path / "out", **SHORT).folder
    for text in (
        "the weather of 1212, the\n\n  12th  week",
        "Zeitgef\u00fchl \u2014 \u6f22\u5b57 12.12",
        "a</s> the </s>b",
    ):
        asked = {"file": str(folder / FILE), "prompt": text, "new_tokens": 4, "exact": True}
        by_text = answered("grace_opt.export.gguf_decode", asked, "llama.cpp")
        by_ids = answered("grace_opt.export.gguf_decode", asked | {"prompt": tokenizer(text).input_ids}, "llama.cpp")
        assert by_text == by_ids


def test_a_file_that_it_does_not_like_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"GGUF and nothing more")
    asked = {"file": str(tmp_path / FILE), "prompt": [4, 5], "new_tokens": 2, "exact": True}
    with pytest.raises(InputError, match="llama.cpp could not run what was written"):
        answered("grace_opt.export.gguf_decode", asked, "llama.cpp")


def test_a_checked_export(tmp_path: Path) -> None:
    model, tokenizer = tiny_bpe(ascii=True)
    done = export(tiny_mask(model, **STOCK), model, tokenizer, "gguf", tmp_path / "out", **SHORT, check=True)
    assert done.checked is not None
    assert done.checked.runtime.startswith("xllamacpp ")
    assert done.checked.largest is not None
    assert done.checked.largest < 1e-3
    assert done.manifest["measured"]["kl"]["mean"] < math.inf
