"""The target vllm without vLLM: what it refuses, and what it writes. tests/export/in_vllm runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from grace_opt import KVMask
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS
from grace_opt.compression.plan import CachePlan, Choice, LayerPlan
from grace_opt.compression.tokens.base import TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.errors import InputError
from grace_opt.export.run import export
from grace_opt.export.target import TARGETS, Source
from grace_opt.export.vllm import INDEX
from grace_opt.testing.exports import check_refusal
from tests.support.exports import SHORT, tiny, tiny_mask


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny()


def changed(mask: KVMask, **more: Any) -> KVMask:
    return replace(mask, plan=CachePlan({i: replace(layer, **more) for i, layer in mask.plan.layers.items()}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": TokenRule(Streaming(), 0.5)}, "cannot drop tokens"),
        ({"choice": Choice(METHODS["grace-opt"], Budget(0.5))}, "cannot choose channels from each prompt"),
        ({"codecs": {}}, "needs a mask that compresses keys or values"),
    ],
)
def test_what_its_caches_cannot_hold_is_refused(loaded: tuple[Any, Any], change: dict[str, Any], sentence: str) -> None:
    assert sentence in check_refusal("vllm", changed(tiny_mask(loaded[0]), **change), loaded[0].config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"readout": "prefill"}, "solve with --readout static"),
        ({"generated": "keep"}, "solve with --method-option generated=prune"),
    ],
)
def test_masks_for_each_prompt_are_refused(loaded: tuple[Any, Any], options: dict[str, Any], sentence: str) -> None:
    assert sentence in check_refusal("vllm", tiny_mask(loaded[0], **options), loaded[0].config)


def test_integers_are_refused(loaded: tuple[Any, Any]) -> None:
    mask = tiny_mask(loaded[0])
    packed = replace(mask, plan=mask.plan.changed(bits={"key": 4}))
    assert "cannot hold rows as integers" in check_refusal("vllm", packed, loaded[0].config)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("Phi3", "runs models of llama, mistral, qwen2, qwen3"), ("Mistral", "sliding-window")],
)
def test_models_that_it_does_not_run_are_refused(family: str, sentence: str) -> None:
    model, _ = tiny(family, sliding_window=8)
    assert sentence in check_refusal("vllm", tiny_mask(model), model.config)


def test_layers_may_stay_whole(loaded: tuple[Any, Any]) -> None:
    mask = tiny_mask(loaded[0])
    some = replace(mask, plan=CachePlan({1: mask.plan.layers[1]}))
    assert TARGETS["vllm"]().supports(some, loaded[0].config) is True
    none = replace(mask, plan=CachePlan({1: LayerPlan(1)}))
    assert TARGETS["vllm"]().supports(none, loaded[0].config) is not True


def test_the_folder_is_the_model_with_a_class_of_the_plugin_and_the_mask(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    folder = export(tiny_mask(loaded[0]), *loaded, "vllm", tmp_path / "out", **SHORT, name="a/model").folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GraceOptLlamaForCausalLM"]
    weights = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert set(weights.values()) == {"model.safetensors"}  # the mask's tensors are no weights
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert set(weights) == set(tensors.keys())
    assert "LLM(" in (folder / "README.md").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in loaded[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_it_is_measured_with_prompts_computed_on_what_is_stored(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from grace_opt.evaluate.documents import passages
    from grace_opt.evaluate.kl import evaluate
    from grace_opt.evaluate.trial import mask_trial

    mask, (model, tokenizer) = tiny_mask(loaded[0]), loaded
    chosen = passages(SHORT["texts"], tokenizer, 40, 8, 1)
    measured = TARGETS["vllm"]().measure(Source(mask, model, tokenizer, "a/model", chosen))
    whole = evaluate(model, chosen, [mask_trial("whole", mask)])[0]
    assert measured["kl"]["mean"] > 0
    assert abs(measured["kl"]["mean"] / whole["kl"]["mean"] - 1) > 1e-3


def test_a_check_without_vllm_says_so(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.export.process.distribution_version", lambda name: "not installed")
    with pytest.raises(InputError, match="vllm is not installed here"):
        export(tiny_mask(loaded[0]), *loaded, "vllm", tmp_path / "out", **SHORT, check=True)
    assert list(tmp_path.iterdir()) == []
