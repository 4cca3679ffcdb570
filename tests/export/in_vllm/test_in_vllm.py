"""vLLM itself generates from exported folders what our own cache generates. Run by .ci/vllm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grace_opt import KVMask
from grace_opt.compression.plan import CachePlan
from grace_opt.export.run import export
from grace_opt.heads import KINDS
from grace_opt.runtime.generate import forced
from grace_opt.testing.exports import check_target
from tests.support.exports import SHORT, TEXTS, tiny, tiny_mask
from tests.support.generation import random_mask
from tests.support.in_vllm import BIG, in_vllm, prompts_of


def exported(mask: KVMask, loaded: tuple[Any, Any], folder: Path) -> Path:
    return export(mask, *loaded, "vllm", folder, **SHORT).folder


def assert_as_ours(found: Any, prompts: list[list[int]], count: int, mask: KVMask, model: Any) -> None:
    """The same tokens, and log-probabilities of all tokens within 1e-3 (fp32), as our cache after a narrow prompt."""
    for prompt, request in zip(prompts, found["requests"], strict=True):
        run, tokens = forced(model, torch.tensor([prompt]), count, mask.plan, narrow=True)
        assert request["tokens"] == tokens.tolist()
        torch.testing.assert_close(torch.tensor(request["logs"]), run.logits.log_softmax(-1), atol=1e-3, rtol=0)


def test_several_requests_chunked_preempted_and_found_again(tmp_path: Path) -> None:
    """Ragged heads, a layer that stays whole, static read-outs, a window and sinks."""
    model, tokenizer = tiny(**BIG)
    mask = random_mask(model, 13, values=16, ragged=True, recent_window=24, sinks=4, readout="static")
    mask = KVMask("tiny", 2, 32, CachePlan({i: mask.plan.layers[i] for i in (0, 2)}), num_hidden_layers=3)
    folder = exported(mask, (model, tokenizer), tmp_path / "out")
    prompts, long = prompts_of(37, 33, 45, 41), prompts_of(150, 97)
    again = [prompt[:90] for prompt in long]
    found = in_vllm(folder, [(prompts, 120)], tmp_path, num_gpu_blocks_override=30)
    assert found["batches"][0]["counts"]["vllm:num_preemptions"] > 0
    assert_as_ours(found["batches"][0], prompts, 120, mask, model)
    found = in_vllm(folder, [(long, 40), (again, 40)], tmp_path)
    assert_as_ours(found["batches"][0], long, 40, mask, model)
    assert found["batches"][1]["counts"]["vllm:prefix_cache_hits"] > 0
    assert_as_ours(found["batches"][1], again, 40, mask, model)
    rows, residuals = found["groups"]
    widths = [sum(layer) for kind in KINDS for layer in mask.plan.widths(kind).values()]
    of_token = 4 * (sum(widths) + 2 * 2 * 32)  # the layer between stays whole
    assert rows["page"] / rows["block"] == pytest.approx(of_token, rel=0.1)
    assert rows["page"] == residuals["page"]
    assert residuals["spec"] == "SinkWindowSpec"


@pytest.mark.parametrize("setting", [{"tensor_parallel_size": 2}, {"enforce_eager": False}])
def test_heads_on_two_ranks_and_a_compiled_model(setting: dict[str, Any], tmp_path: Path) -> None:
    """Two processes share this machine's memory node, which vLLM would not do by itself."""
    model, tokenizer = tiny(**BIG)
    mask = random_mask(model, 13, values=16, ragged=True, recent_window=24, sinks=4, readout="static")
    folder, prompts = exported(mask, (model, tokenizer), tmp_path / "out"), prompts_of(37, 133)
    found = in_vllm(folder, [(prompts, 40)], tmp_path, **setting)
    assert_as_ours(found["batches"][0], prompts, 40, mask, model)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])  # Llama has all tests above
def test_the_kit_passes(family: str) -> None:
    model, tokenizer = tiny(family, **({"sliding_window": None} if family == "Mistral" else {}))
    check_target("vllm", tiny_mask(model), model, tokenizer, TEXTS)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_the_kit_passes_with_heads_of_128_channels(family: str) -> None:
    model, tokenizer = tiny(family, head_dim=128)
    check_target("vllm", tiny_mask(model, kept=48, values=40), model, tokenizer, TEXTS)
