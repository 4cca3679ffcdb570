"""kvpress itself runs what is exported for it. Run by .ci/runtimes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress import ComposedPress, KnormPress, KVPressTextGenerationPipeline
from transformers import DynamicCache

from grace_opt import InputError, KVMask, save_mask
from grace_opt.export.kvpress_press import MaskPress
from grace_opt.export.run import export
from grace_opt.export.store import KVStore
from grace_opt.testing.exports import check_target
from tests.support.exports import SHORT, TEXTS, tiny, tiny_mask

IDS = torch.randint(4, 99, (2, 60), generator=torch.Generator().manual_seed(0))


def packed(mask: KVMask) -> KVMask:
    return replace(mask, plan=mask.plan.changed(bits={"key": 4, "value": 4}))


@pytest.mark.parametrize("variant", [{"ragged": True}, {"values": None, "readout": "prefill"}], ids=str)
def test_kvpress_conforms(variant: dict[str, Any]) -> None:
    model, tokenizer = tiny()
    check_target("kvpress", tiny_mask(model, **variant), model, tokenizer, TEXTS, length=80)


@pytest.mark.parametrize("family", ["Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_kvpress_conforms_in_other_families(family: str) -> None:
    model, tokenizer = tiny(family, **({"sliding_window": None} if family in ("Mistral", "Phi3") else {}))
    check_target("kvpress", packed(tiny_mask(model, readout="prefill")), model, tokenizer, TEXTS, length=80)


def pressed(model: Any, press: Any) -> DynamicCache:
    past = DynamicCache()
    with torch.inference_mode(), press(model):
        model(IDS, past_key_values=past)
    return past


@pytest.mark.parametrize("bits", [False, True])
def test_a_pressed_cache_is_a_stored_one(bits: bool, tmp_path: Path) -> None:
    model, _ = tiny()
    mask = packed(tiny_mask(model)) if bits else tiny_mask(model)
    save_mask(mask, tmp_path / "mask")
    past, whole = pressed(model, MaskPress(tmp_path / "mask")), DynamicCache()
    with torch.inference_mode():
        model(IDS, past_key_values=whole)
    store = KVStore(mask)
    for layer, (keys, values) in zip(past.layers, store.decode(store.encode(whole)), strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_it_composes_and_says_how_much_it_drops(tmp_path: Path) -> None:
    model, _ = tiny()
    save_mask(tiny_mask(model), tmp_path / "mask")
    press = MaskPress(tmp_path / "mask")
    assert press.compression_ratio == 0.5
    past = pressed(model, ComposedPress([press, KnormPress(0.5)]))
    assert past.layers[0].keys.shape[2] == 30
    other, _ = tiny(head_dim=32)
    with pytest.raises(InputError, match="it is for keys of 16 channels, and these have 32"):
        pressed(other, press)


def test_the_written_file_answers_in_the_pipeline(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    folder = export(tiny_mask(model), model, tokenizer, "kvpress", tmp_path / "out", **SHORT).folder
    spec = importlib.util.spec_from_file_location("press", folder / "press.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    context = " ".join(f"w{i}" for i in range(4, 70))
    said = pipe(context, question="w7 w8", press=module.press, max_new_tokens=4)["answer"]
    assert said != ""
