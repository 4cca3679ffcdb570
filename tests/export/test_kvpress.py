"""The target kvpress without kvpress: what it writes and refuses. tests/export/in_kvpress runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grace_opt import InputError
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.tokens.base import TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.export.run import export
from grace_opt.testing.exports import check_refusal
from tests.support.exports import SHORT, tiny, tiny_mask


def test_the_folder_is_a_press_and_the_mask(tmp_path: Path) -> None:
    folder = export(tiny_mask(tiny()[0]), *tiny(), "kvpress", tmp_path / "out", **SHORT, name="a/model").folder
    names = {path.name for path in folder.iterdir()}
    written = {"press.py", "requirements.txt", "README.md", "kv_mask.json", "kv_mask.safetensors"}
    assert names == written | {"grace_opt_export.json"}
    assert "MaskPress(Path(__file__)" in (folder / "press.py").read_text(encoding="utf-8")
    compile((folder / "press.py").read_text(encoding="utf-8"), "press.py", "exec")
    assert "kv-press-text-generation" in (folder / "README.md").read_text(encoding="utf-8")


def test_what_no_press_of_ours_does_is_refused() -> None:
    model, _ = tiny()
    mask = tiny_mask(model)
    rule = TokenRule(Streaming(), 0.5)
    drops = CachePlan({i: replace(layer, tokens=rule) for i, layer in mask.plan.layers.items()})
    assert "cannot drop tokens" in check_refusal("kvpress", replace(mask, plan=drops), model.config)
    other, _ = tiny("GPTNeoX")
    assert "and this is a gpt_neox" in check_refusal("kvpress", tiny_mask(other), other.config)
    slides, _ = tiny("Mistral", sliding_window=8)
    assert "sliding-window layers" in check_refusal("kvpress", tiny_mask(slides), slides.config)


def test_a_check_without_kvpress_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.export.process.distribution_version", lambda name: "not installed")
    with pytest.raises(InputError, match="kvpress is not installed here; install it beside grace-opt"):
        export(tiny_mask(tiny()[0]), *tiny(), "kvpress", tmp_path / "out", **SHORT, check=True)
    assert list(tmp_path.iterdir()) == []
