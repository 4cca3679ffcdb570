"""Scoring under compressed caches against the real runtime and against caches changed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

import grace_opt.runtime
from grace_opt import InputError, KVMask
from grace_opt.compression.budget import Budget
from grace_opt.compression.headmaps import Compression
from grace_opt.compression.method import METHODS, Method, method
from grace_opt.evaluate.documents import Document
from grace_opt.evaluate.prefill import greedy_tokens, log_probabilities, prefill
from grace_opt.evaluate.run import Run, evaluate, held_bytes, mask_run, prompts, runs
from tests.support.families import FAMILIES, ByteTokenizer, tiny_model

PREFIX, SCORED = 60, 24
IDS = np.random.default_rng(0).integers(3, 99, PREFIX + SCORED).tolist()
SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}


def scored(
    state: Any, compression: Compression | None, prune_generated: bool = False, chunk: int = 256
) -> torch.Tensor:
    return torch.cat(list(log_probabilities(state, compression, prune_generated=prune_generated, chunk=chunk)))


def cli(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "grace_opt", *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def compressed(state: Any, policy: Method, budget: Budget) -> Compression:
    return Run("x", policy, budget).compress(state)


@pytest.mark.parametrize("readout", ["none", "prefill", "static"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "Granite"])
def test_pruning_as_tokens_leave_the_window_equals_the_real_cache_token_by_token(family: str, readout: str) -> None:
    model = tiny_model(family)
    state = prefill(model, IDS, PREFIX, 32)
    options = {**SMALL, "observation_window": 32, "readout": "none" if readout == "none" else "attention"}
    compression = compressed(state, method("grace", options), Budget(0.5))
    heads = {i: each.heads["key"] for i, each in compression.layers.items()}
    keep = {i: tuple(head.encode.numpy().astype(np.int32) for head in each) for i, each in heads.items()}
    count, n = state.past.layers[max(keep)].keys.shape[1::2]
    extra = {}
    for i, head in product(keep if readout == "static" else (), range(count)):
        dropped = np.setdiff1d(np.arange(n), keep[i][head])
        each, name = heads[i][head], f"layers.{i}.k.kv_heads.{head}.readout"
        extra |= {f"{name}.matrix": each.decode.numpy()[dropped], f"{name}.constant": each.constant.numpy()[dropped]}
    mask = KVMask("m", count, n, keep, recent_window=8, sinks=2, readout_scope=readout, extra=extra)
    past = grace_opt.runtime.cache(mask, model)
    with torch.inference_mode():
        model(torch.tensor([IDS[:PREFIX]]), past_key_values=past)
        rows = [model(torch.tensor([[token]]), past_key_values=past).logits[0, -1] for token in IDS[PREFIX:]]
    real = torch.stack(rows).log_softmax(-1)
    for chunk in (256, 7):
        torch.testing.assert_close(scored(state, compression, True, chunk), real, atol=1e-4, rtol=1e-5)
    assert past.nbytes >= held_bytes(state, compression) * PREFIX * (len(keep) / len(state.past.layers)) * 0.5


@pytest.mark.model
def test_the_real_model_decodes_from_ragged_heads_with_a_read_out_as_it_is_scored(smollm2: tuple[Any, Any]) -> None:
    from pydoc_data.topics import topics

    model, tokenizer = smollm2
    ids = tokenizer(" ".join(topics[name] for name in sorted(topics)[:20]))["input_ids"][:312]
    state = prefill(model, ids, 300, 32)
    compression = compressed(state, METHODS["grace-opt"], Budget(0.6))
    heads = {i: each.heads["key"] for i, each in compression.layers.items()}
    keep = {i: tuple(head.encode.numpy().astype(np.int32) for head in each) for i, each in heads.items()}
    assert len({len(kept) for each in keep.values() for kept in each}) > 10
    past = grace_opt.runtime.cache(KVMask("smollm2-135m", 3, 64, keep, readout_scope="prefill"), model)
    with torch.inference_mode():
        model(torch.tensor([ids[:300]]), past_key_values=past)
        rows = [model(torch.tensor([[token]]), past_key_values=past).logits[0, -1] for token in ids[300:]]
    real = torch.stack(rows).log_softmax(-1)
    torch.testing.assert_close(scored(state, compression, True), real, atol=2e-3, rtol=1e-4)
    plain = scored(state, None)
    divergence = (plain.exp() * (plain - real)).sum(-1).mean()
    assert 0 < divergence < 0.1


def test_kept_tokens_see_the_prompt_as_stored() -> None:
    """The definition: the prompt's old keys and values are replaced, all else stays; no attention function of ours."""
    model = tiny_model("Llama")
    state = prefill(model, IDS, PREFIX, 8)
    for policy, budget in (
        (method("grace-opt", SMALL), Budget(0.5, 0.4)),
        (method("think", SMALL), Budget(0.6)),
        (method("svd", SMALL), Budget(0.5)),
        (method("grace-opt", {**SMALL, "key_bits": 4, "value_bits": 3}), Budget(0.3, 0.3)),
    ):
        compression = compressed(state, policy, budget)
        past = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([IDS[:PREFIX]]), past_key_values=past)
            for i, layer in enumerate(past.layers):
                heads = compression.layers[i].heads
                for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                    for head, each in enumerate(heads.get(kind, ())):  # type: ignore[call-overload]
                        old = tensor[0, head, 2 : PREFIX - 8]
                        old.copy_(each.constant + each.read(each.store(old)) - each.constant)
            model.set_attn_implementation("sdpa")
            real = model(torch.tensor([IDS[PREFIX:]]), past_key_values=past).logits[0].log_softmax(-1)
        for chunk in (256, 7):
            torch.testing.assert_close(scored(state, compression, chunk=chunk), real, atol=1e-4, rtol=1e-5)


def test_streaming_sees_only_sinks_and_recent_tokens() -> None:
    model = tiny_model("Llama")
    state = prefill(model, IDS, PREFIX, 8)
    compression = compressed(state, method("streaming", SMALL), Budget(0.5, 0.5))
    window = compression.recent_window
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([IDS[:PREFIX]]), past_key_values=past)
        for layer in past.layers:
            layer.keys = torch.cat([layer.keys[:, :, :2], layer.keys[:, :, -window:]], 2)
            layer.values = torch.cat([layer.values[:, :, :2], layer.values[:, :, -window:]], 2)
        model.set_attn_implementation("eager")
        rest = torch.tensor([IDS[PREFIX:]])
        at = torch.arange(PREFIX, PREFIX + SCORED)[None]
        real = model(rest, past_key_values=past, position_ids=at).logits[0].log_softmax(-1)
    for chunk in (256, 7):
        torch.testing.assert_close(scored(state, compression, chunk=chunk), real, atol=1e-4, rtol=1e-5)
    assert held_bytes(state, compression) < 0.75 * held_bytes(state, None)
    assert scored(state, compression, prune_generated=True).shape == real.shape


@pytest.mark.parametrize("prune_generated", [False, True])
def test_no_compression_changes_nothing_and_the_cache_is_put_back(prune_generated: bool) -> None:
    model = tiny_model("Llama")
    state = prefill(model, IDS, PREFIX, 8)
    plain = scored(state, None)
    nothing = compressed(state, method("grace-opt", SMALL), Budget(0.0))
    torch.testing.assert_close(scored(state, nothing, prune_generated), plain, atol=1e-4, rtol=1e-5)
    with torch.inference_mode():
        whole = model(torch.tensor([IDS])).logits[0, PREFIX:].log_softmax(-1)
    torch.testing.assert_close(plain, whole, atol=1e-4, rtol=1e-5)
    assert state.past.get_seq_length() == PREFIX
    assert model.config._attn_implementation == "sdpa"


def test_greedy_tokens_are_the_models_own() -> None:
    model = tiny_model("Llama")
    state = prefill(model, IDS, PREFIX, 8)
    own = model.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert greedy_tokens(state, None, 6) == own[0, len(IDS) :].tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_evaluated(family: str) -> None:
    model, tokenizer = tiny_model(family), ByteTokenizer()
    texts = [Document("a", "some text of no meaning " * 30), Document("b", "another one, as dull " * 30)]
    chosen, _ = prompts(model, tokenizer, texts, PREFIX, SCORED, 2)
    policies = {name: method(name, SMALL) for name in ("think", "grace-opt")}
    records = evaluate(model, tokenizer, chosen, runs(policies, [Budget(0.5, 0.25), Budget(bytes_per_token=150)]))
    assert [record["method"] for record in records] == ["think", "grace-opt"] * 2
    for record in records:
        assert 0 <= record["kl"]["low"] <= record["kl"]["mean"] <= record["kl"]["high"]
        assert record["method"] != "think" or record["bytes_per_token"] < record["full_bytes_per_token"]
        assert len(record["kl_documents"]) == 2
        assert len(record["kl_positions"]) == 8
        json.dumps(record, allow_nan=False)
    if family == "Gemma3Text":
        assert records[0]["layers"] == [1]


def test_records_of_one_document_have_no_interval_and_masks_are_evaluated(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    chosen, _ = prompts(model, tokenizer, [Document("a", "words " * 99)], PREFIX, SCORED, 3)
    keep = tuple(np.arange(8, dtype=np.int32) for _ in range(2))
    plain = KVMask("m", 2, 16, {0: keep, 1: keep}, recent_window=8, sinks=2)
    read = KVMask("m", 2, 16, {0: keep, 1: keep}, recent_window=8, sinks=2, readout_scope="prefill")
    records = evaluate(model, tokenizer, chosen, [mask_run("plain", plain), mask_run("read", read)])
    assert records[0]["kl"]["low"] is None
    assert records[0]["documents"] == 1
    assert records[1]["kl"]["mean"] < records[0]["kl"]["mean"]
    static = KVMask("m", 2, 16, {0: keep, 1: keep}, recent_window=8, sinks=2, readout_scope="static")
    with pytest.raises(InputError, match="static read-out layers.0.k.kv_heads.0.readout is missing"):
        evaluate(model, tokenizer, chosen, [mask_run("static", static)])
    wrong = KVMask("m", 2, 16, {0: keep, 5: keep})
    with pytest.raises(InputError, match="was made for 'm'"):
        evaluate(model, tokenizer, chosen, [mask_run("wrong", wrong)])


def test_prompts_that_do_not_fit_are_refused() -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    texts = [Document("a", "words " * 99)]
    with pytest.raises(InputError, match="context of 256"):
        prompts(model, tokenizer, texts, 250, 24, 1)
    with pytest.raises(InputError, match="context of 256"):
        prompts(model, tokenizer, texts, 60, 24, 1, [4096], [0.5])
    chosen, _ = prompts(model, tokenizer, texts, 30, 4, 1)
    with pytest.raises(InputError, match="no prunable key"):
        evaluate(model, tokenizer, chosen, runs({"think": METHODS["think"]}, [Budget(0.5)]))


@pytest.mark.model
def test_the_command_measures_writes_and_draws(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    from pydoc_data.topics import topics

    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])
    folder = tmp_path / "out"
    arguments = ("evaluate", "smollm2-135m", "--text", text, "--prefix", 200, "--scored", 40, "--documents", 3)
    policies = ("--method", "think", "--method", "grace-opt", "--ratio", 0.6, "--value-ratio", 0.2)
    needles = ("--needle-length", 150, "--needle-depth", 0.5)
    result = cli(*arguments, *policies, *needles, "-o", folder, "-f", "json")
    think, ours = json.loads(result.stdout)["records"]
    assert (think["method"], ours["method"]) == ("think", "grace-opt")
    assert ours["kl"]["mean"] < think["kl"]["mean"]
    assert ours["against_first"] < 1
    assert think["needle"]["mean"] in (0, 1)
    assert think["documents"] == 3
    assert [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()] == [think, ours]
    assert json.loads((folder / "run.json").read_text())["command"][:2] == ["grace-opt", "evaluate"]
    assert {path.name for path in folder.glob("*.png")} >= {"pareto.png", "positions.png", "needles.png"}


def test_integers_are_not_scored_where_they_would_depend_on_later_tokens() -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    chosen, _ = prompts(model, tokenizer, [Document("a", "words " * 99)], PREFIX, SCORED, 1)
    packed = runs({"grace-opt": method("grace-opt", {**SMALL, "key_bits": 4})}, [Budget(0.5)])
    with pytest.raises(InputError, match="leave out --prune-generated or the bits"):
        evaluate(model, tokenizer, chosen, packed, prune_generated=True)
    other = KVMask("m", 4, 16, {0: tuple(np.arange(8, dtype=np.int32) for _ in range(4))}, recent_window=8, sinks=2)
    with pytest.raises(InputError, match="the mask has 4 KV heads of 16 channels, the model has 2 of 16"):
        evaluate(model, tokenizer, chosen, [mask_run("other", other)])
    half = KVMask("m", 2, 16, {0: tuple(np.arange(8, dtype=np.int32) for _ in range(2))}, recent_window=8, sinks=2)
    record = evaluate(model, tokenizer, chosen, [mask_run("half", half)])[0]
    assert record["kept"] == {"key": [[8.0, 8.0], [16.0, 16.0]], "value": None}
    assert (record["options"]["recent_window"], record["options"]["sinks"]) == (8, 2)
