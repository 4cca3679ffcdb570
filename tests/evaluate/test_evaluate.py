"""Scoring under compressed caches against the real runtime and against caches changed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

import grace_opt.runtime
from grace_opt import InputError, KVMask
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, method
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.readout import ReadoutRecipe
from grace_opt.evaluate.capture import Captured, capture, dense
from grace_opt.evaluate.documents import Document
from grace_opt.evaluate.kl import evaluate, prompts
from grace_opt.evaluate.replay import Decoding, decode, log_probabilities, replay
from grace_opt.evaluate.trial import Trial, mask_trial, trials
from grace_opt.records import EvaluationRecord, check
from grace_opt.runtime.cache import cache_nbytes
from tests.support.families import FAMILIES, ByteTokenizer, tiny_model

PREFIX, SCORED = 60, 24
IDS = np.random.default_rng(0).integers(3, 99, PREFIX + SCORED).tolist()
SMALL = {"recent_window": 8, "sinks": 2, "observation_window": 8, "floor": 1}


def scored(captured: Captured, plan: CachePlan | None, chunk: int = 256) -> torch.Tensor:
    if plan is None:
        return torch.cat(list(log_probabilities(captured, dense(captured), chunk=chunk)))
    with torch.inference_mode(), replay(captured, plan) as past:
        return torch.cat(list(log_probabilities(captured, past, chunk=chunk)))


def planned(captured: Captured, name: str, budget: Budget, generated: Any = None, **options: Any) -> CachePlan:
    return Trial("x", method(name, {**SMALL, **options}), budget, generated).plan(captured)


def by_hand(model: Any, plan: CachePlan, ids: Any = None) -> torch.Tensor:
    """What a user gets who gives the plan's cache to the model, token by token."""
    ids = IDS if ids is None else ids
    prefix = len(ids) - SCORED
    with torch.inference_mode(), grace_opt.runtime.cache(plan, model) as past:
        model(torch.tensor([ids[:prefix]]), past_key_values=past)
        rows = [model(torch.tensor([[token]]), past_key_values=past).logits[0, -1] for token in ids[prefix:]]
    return torch.stack(rows).log_softmax(-1)


def cli(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "grace_opt", *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


CASES: list[tuple[str, Budget, dict[str, Any]]] = [
    *((name, Budget(0.5, 0.4), {}) for name in METHODS),
    ("grace-opt", Budget(0.3, 0.3), {"key_bits": 4, "value_bits": 3}),
    ("kq-svd", Budget(0.3, 0.3), {"key_bits": 8, "value_bits": 4}),
    ("grace-opt", Budget(0.0, 0.0), {"key_bits": 2}),
    ("grace-opt", Budget(0.4, 0.0), {"tokens": "streaming", "token_share": 0.5}),
    ("grace-opt", Budget(0.4, 0.2), {"tokens": "streaming", "token_share": 0.4, "key_bits": 4}),
]


@pytest.mark.parametrize("generated", ["keep", "prune"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_what_is_measured_is_what_runs(family: str, generated: str) -> None:
    """For every method: the logits of the replay equal those of the model on the same plan's cache, token by token."""
    model = tiny_model(family)
    captured = capture(model, IDS, PREFIX, 32)
    for name, budget, options in CASES:
        if generated == "prune" and {"tokens", "key_bits"} <= options.keys():
            continue  # packed blocks drop no tokens
        if name == "asvd" and family == "Gemma3Text":
            continue  # its keys are normalised after their projection, which has no factors then
        plan = planned(captured, name, budget, generated=generated, **options)
        real = by_hand(model, plan)
        for chunk in (256, 7):
            torch.testing.assert_close(scored(captured, plan, chunk), real, atol=1e-4, rtol=1e-5)


@pytest.mark.model
@pytest.mark.parametrize("name", METHODS)
def test_what_is_measured_of_the_real_model_is_what_runs(smollm2: tuple[Any, Any], name: str) -> None:
    from pydoc_data.topics import topics

    model, tokenizer = smollm2
    ids = tokenizer(" ".join(topics[each] for each in sorted(topics)[:20]))["input_ids"][: 300 + SCORED]
    trial = Trial(name, METHODS[name], Budget(0.6, 0.2))
    captured = capture(model, ids, 300, trial.queries)
    plan = trial.plan(captured)
    if name == "grace-opt":
        assert len({width for each in plan.widths("key").values() for width in each}) > 10
    real = by_hand(model, plan, ids)
    found = scored(captured, plan)
    torch.testing.assert_close(found, real, atol=2e-4, rtol=1e-4)
    plain = scored(captured, None)
    divergence = (plain.exp() * (plain - real)).sum(-1).mean()
    assert 0 < divergence < 0.5


def test_kept_tokens_see_the_prompt_as_stored() -> None:
    """The definition: the prompt's old keys and values are replaced, all else stays; no attention function of ours."""
    model = tiny_model("Llama")
    captured = capture(model, IDS, PREFIX, 8)
    for name, budget in (("grace-opt", Budget(0.5, 0.4)), ("think", Budget(0.6)), ("svd", Budget(0.5, 0.2))):
        plan = planned(captured, name, budget)
        past = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([IDS[:PREFIX]]), past_key_values=past)
            with replay(captured, plan) as made:
                for layer, held in zip(past.layers, made.layers, strict=True):
                    for heads, part in parts(held):
                        for tensor, side in zip((layer.keys, layer.values), part.sides, strict=True):
                            old = tensor[:, heads, 2 : PREFIX - 8]
                            read = side.codec.read(side.codec.stored(side.codec.encode(old)), None)
                            tensor[:, heads, 2 : PREFIX - 8] = read
            assert model.config._attn_implementation == "sdpa"
            real = model(torch.tensor([IDS[PREFIX:]]), past_key_values=past).logits[0].log_softmax(-1)
        for chunk in (256, 7):
            torch.testing.assert_close(scored(captured, plan, chunk), real, atol=1e-4, rtol=1e-5)


def parts(layer: Any) -> list[tuple[Any, Any]]:
    """The heads and the layer of each part of a compressed layer."""
    return list(zip(layer.heads, layer.parts, strict=True)) if hasattr(layer, "parts") else [(slice(None), layer)]


def test_streaming_sees_only_sinks_and_recent_tokens() -> None:
    model = tiny_model("Llama")
    captured = capture(model, IDS, PREFIX, 8)
    plan = planned(captured, "streaming", Budget(0.5, 0.5))
    window = 8 + round(0.5 * (PREFIX - 8 - 2))
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
        torch.testing.assert_close(scored(captured, plan, chunk), real, atol=1e-4, rtol=1e-5)
    with replay(captured, plan) as made:
        assert made.nbytes < 0.75 * cache_nbytes(captured.past)
        assert made.get_seq_length() == PREFIX


@pytest.mark.parametrize("generated", ["keep", "prune"])
def test_no_compression_changes_nothing_and_the_cache_is_put_back(generated: str) -> None:
    model = tiny_model("Llama")
    captured = capture(model, IDS, PREFIX, 8)
    plain = scored(captured, None)
    nothing = planned(captured, "grace-opt", Budget(0.0), generated=generated)
    torch.testing.assert_close(scored(captured, nothing), plain, atol=1e-4, rtol=1e-5)
    with torch.inference_mode():
        whole = model(torch.tensor([IDS])).logits[0, PREFIX:].log_softmax(-1)
    torch.testing.assert_close(plain, whole, atol=1e-4, rtol=1e-5)
    assert captured.past.get_seq_length() == PREFIX
    assert model.config._attn_implementation == "sdpa"


def test_decoded_tokens_are_the_models_own_alone_and_side_by_side() -> None:
    model = tiny_model("Llama")
    captured = capture(model, IDS, PREFIX, 8)

    def own(ids: list[int]) -> list[int]:
        made = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        return made[0, len(ids) :].tolist()

    def row(following: list[int], stop: int = 9) -> Decoding:
        return Decoding(dense(captured), torch.tensor([following]), 6, lambda tokens: len(tokens) == stop)

    expected = own(IDS)
    alone = row(IDS[PREFIX:])
    decode(model, [alone])
    assert alone.tokens == expected
    rows = [row(IDS[PREFIX:]), row(IDS[PREFIX:], stop=2), row(IDS[PREFIX:-5]), row(IDS[PREFIX:], stop=1)]
    decode(model, rows)
    assert [each.tokens for each in rows] == [expected, expected[:2], own(IDS[:-5]), expected[:1]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_evaluated(family: str) -> None:
    model, tokenizer = tiny_model(family), ByteTokenizer()
    texts = [Document("a", "some text of no meaning " * 30), Document("b", "another one, as dull " * 30)]
    chosen = prompts(model, tokenizer, texts, PREFIX, SCORED, 2)
    policies = {name: method(name, SMALL) for name in ("think", "grace-opt")}
    records = evaluate(model, chosen, trials(policies, [Budget(0.5, 0.25), Budget(bytes_per_token=150)]))
    assert [record["method"] for record in records] == ["think", "grace-opt"] * 2
    for record in records:
        assert 0 <= record["kl"]["low"] <= record["kl"]["mean"] <= record["kl"]["high"]
        assert record["method"] != "think" or record["bytes_per_token"] < record["full_bytes_per_token"]
        assert len(record["kl_documents"]) == 2
        assert len(record["kl_positions"]) == 8
        json.dumps(record, allow_nan=False)
        check(EvaluationRecord, record)
        assert record["generated"] == "keep"
    if family == "Gemma3Text":
        assert records[0]["layers"] == [1]


def test_records_of_one_document_have_no_interval_and_masks_are_evaluated(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    chosen = prompts(model, tokenizer, [Document("a", "words " * 99)], PREFIX, SCORED, 3)
    keep = tuple(np.arange(8, dtype=np.int32) for _ in range(2))
    plain = KVMask.of_channels("m", 2, 16, {0: keep, 1: keep}, recent_window=8, sinks=2)
    read = KVMask.of_channels("m", 2, 16, {0: keep, 1: keep}, recent_window=8, sinks=2, readout=ReadoutRecipe())
    records = evaluate(model, chosen, [mask_trial("plain", plain), mask_trial("read", read)])
    assert records[0]["kl"]["low"] is None
    assert records[0]["documents"] == 1
    assert records[1]["kl"]["mean"] < records[0]["kl"]["mean"]
    wrong = KVMask.of_channels("m", 2, 16, {0: keep, 5: keep})
    with pytest.raises(InputError, match="was made for 'm'"):
        evaluate(model, chosen, [mask_trial("wrong", wrong)])


def test_prompts_that_do_not_fit_are_refused() -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    texts = [Document("a", "words " * 99)]
    with pytest.raises(InputError, match="context of 256"):
        prompts(model, tokenizer, texts, 250, 24, 1)
    chosen = prompts(model, tokenizer, texts, 30, 4, 1)
    with pytest.raises(InputError, match="no prunable key"):
        evaluate(model, chosen, trials({"think": METHODS["think"]}, [Budget(0.5)]))


@pytest.mark.model
def test_the_command_measures_writes_and_draws(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    from pydoc_data.topics import topics

    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000], encoding="utf-8")
    folder = tmp_path / "out"
    arguments = ("evaluate", "smollm2-135m", "--text", text, "--length", 200, "--scored", 40, "--prompts", 3)
    policies = ("--method", "think", "--method", "grace-opt", "--ratio", 0.6, "--value-ratio", 0.2)
    asked = ("--task", "kl", "--task", "needle/single", "--no-chat")
    result = cli(*arguments, *policies, *asked, "-o", folder, "-f", "json")
    think, ours, *answered = json.loads(result.stdout)["records"]
    assert (think["method"], ours["method"]) == ("think", "grace-opt")
    assert ours["kl"]["mean"] < think["kl"]["mean"]
    assert ours["against_first"] < 1
    assert [(r["protocol"], r["method"]) for r in answered] == [
        (protocol, name) for protocol in ("query-aware", "context-only") for name in ("full", "think", "grace-opt")
    ]
    assert answered[0]["score"]["mean"] == 1
    assert think["documents"] == 3
    assert [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()] == [
        think,
        ours,
        *answered,
    ]
    assert json.loads((folder / "run.json").read_text())["command"][:2] == ["grace-opt", "evaluate"]
    assert {path.name for path in folder.glob("*.png")} >= {"pareto.png", "positions.png", "scores-query-aware-200.png"}
    assert (folder / "report.html").stat().st_size > 10_000
    again = cli(*arguments, *policies, *asked, "-o", folder, "-f", "json")  # all is known
    assert json.loads(again.stdout) == json.loads(result.stdout)


def test_how_generated_tokens_are_held_can_be_asked_for_and_masks_of_other_models_are_refused() -> None:
    model, tokenizer = tiny_model("Llama"), ByteTokenizer()
    chosen = prompts(model, tokenizer, [Document("a", "words " * 99)], PREFIX, SCORED, 1)
    packed = {"grace-opt": method("grace-opt", {**SMALL, "key_bits": 4})}
    asked: tuple[Any, ...] = (None, "keep", "prune")
    kl = [evaluate(model, chosen, trials(packed, [Budget(0.5)], each))[0]["kl"]["mean"] for each in asked]
    assert kl[0] == kl[1] < kl[2]
    other = KVMask.of_channels(
        "m", 4, 16, {0: tuple(np.arange(8, dtype=np.int32) for _ in range(4))}, recent_window=8, sinks=2
    )
    with pytest.raises(
        InputError, match="the mask has 4 KV heads of 16 key channels in layer 0, the model has 2 of 16"
    ):
        evaluate(model, chosen, [mask_trial("other", other)])
    half = KVMask.of_channels(
        "m", 2, 16, {0: tuple(np.arange(8, dtype=np.int32) for _ in range(2))}, recent_window=8, sinks=2
    )
    record = evaluate(model, chosen, [mask_trial("half", half)])[0]
    assert record["kept"] == {"key": [[8.0, 8.0], [16.0, 16.0]], "value": None}
    assert (record["options"]["recent_window"], record["options"]["sinks"]) == (8, 2)
