"""The pruned cache equals a cache whose pruned channels are zero, in every way that a model is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt import InputError
from grace_opt.runtime.cache import PrunedCache
from grace_opt.runtime.layer import PrunedLayer
from tests.support.families import FAMILIES, tiny_model
from tests.support.generation import assert_same, compare, prompts, random_mask, run
from tests.support.reference import use_zero_channel_attention
from tests.support.slack import assert_logits


@pytest.mark.parametrize("recent_window", [0, 1, 32, 500])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_zero_channel_reference(family: str, recent_window: int) -> None:
    model = tiny_model(family)
    compare(model, random_mask(model, 7, recent_window=recent_window, sinks=0))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"])
@pytest.mark.parametrize("readout", ["none", "static"])
@pytest.mark.parametrize("sinks", [0, 1, 4, 30])
@pytest.mark.parametrize("recent_window", [0, 1, 6, 500])
@pytest.mark.parametrize("generated", ["prune", "keep"])
def test_sinks_beams_and_chunks(
    generated: str, recent_window: int, sinks: int, readout: str, more: dict[str, int]
) -> None:
    model = tiny_model("Llama")
    mask = random_mask(
        model, 7, recent_window=recent_window, sinks=sinks, readout=readout, values=9, generated=generated
    )
    compare(model, mask, **more)


@given(
    recent_window=st.integers(0, 12),
    sinks=st.integers(0, 12),
    kept=st.integers(0, 16),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    padding=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    generated=st.sampled_from(["keep", "prune"]),
)
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_updates(
    recent_window: int, sinks: int, kept: int, chunks: list[int], padding: list[int], generated: str
) -> None:
    model = tiny_model("Qwen2")
    mask = random_mask(model, kept, recent_window=recent_window, sinks=sinks, generated=generated)
    total = sum(chunks)
    ids = torch.randint(3, 99, (2, total), generator=torch.Generator().manual_seed(total))
    attended = torch.ones_like(ids)
    for row, pads in enumerate(padding):
        attended[row, : min(pads, total - 1)] = 0

    def logits(past: Any) -> torch.Tensor:
        seen, pieces = 0, []
        with torch.inference_mode():
            for size in chunks:
                part = slice(seen, seen + size)
                seen += size
                given_ids = {"input_ids": ids[:, part], "attention_mask": attended[:, :seen], "past_key_values": past}
                positions = (attended[:, :seen].cumsum(-1) - 1).clamp(min=0)[:, part]
                pieces.append(model(**given_ids, position_ids=positions).logits)
        return torch.cat(pieces, 1)[attended.bool()]

    pruned = logits(grace_opt.runtime.cache(mask, model))
    use_zero_channel_attention(model, mask)
    assert_logits(pruned, logits(DynamicCache(config=model.config)))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GPTNeoX"])
def test_heads_of_different_widths(family: str, more: dict[str, int]) -> None:
    model = tiny_model(family)
    for readout in ("none", "static"):
        past = compare(model, random_mask(model, 7, recent_window=6, sinks=2, readout=readout, ragged=True), **more)
    layer = past.layers[-1]
    assert layer.get_seq_length() == 21 + 24 - 1
    before = past.nbytes
    past.batch_select_indices(torch.tensor([0, 2]))
    assert past.nbytes < before
    past.reset()
    assert layer.tensors() == []


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("readout", ["none", "static", "prefill"])
def test_a_padded_row_gives_what_it_gives_alone(readout: str, sinks: int, ragged: bool) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=sinks, readout=readout, ragged=ragged)
    ids, attended = prompts()
    together = run(model, grace_opt.runtime.cache(mask, model))
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1, attended[row].bool()],
            past_key_values=grace_opt.runtime.cache(mask, model),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(alone[0, -24:], together.sequences[row, -24:])


def test_a_prompt_without_old_tokens_reads_zeros() -> None:
    model = tiny_model("Llama")
    plain, fitted = (random_mask(model, 6, recent_window=18, sinks=3, readout=scope) for scope in ("none", "prefill"))
    assert_same(run(model, grace_opt.runtime.cache(fitted, model)), run(model, grace_opt.runtime.cache(plain, model)))


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Phi3"])
def test_a_mask_that_prunes_nothing_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    mask = random_mask(model, 16, recent_window=2, sinks=1)
    plain = run(model, None)
    assert_same(run(model, grace_opt.runtime.cache(mask, model)), plain)
    assert_same(run(model, None), plain)  # and the model still runs without the cache


@pytest.mark.parametrize("generated", ["prune", "keep"])
@pytest.mark.parametrize(("tokens", "recent_window", "sinks"), [(1500, 32, 4), (700, 0, 0), (300, 500, 4)])
def test_bytes_are_those_of_what_must_be_kept(tokens: int, recent_window: int, sinks: int, generated: str) -> None:
    model = tiny_model("Llama", max_position_embeddings=2048)
    mask = random_mask(model, 6, recent_window=recent_window, sinks=sinks, generated=generated)
    past = grace_opt.runtime.cache(mask, model)
    ids = torch.randint(3, 99, (2, tokens))
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=past)
        for step in range(40):
            model(input_ids=ids[:, step : step + 1], past_key_values=past)
    tokens += 40
    whole = (min(tokens, recent_window) if generated == "prune" else min(tokens - 40, recent_window) + 40) + sinks
    spare = min(tokens - whole + sinks, recent_window, 32)  # so that as many tokens can be taken back
    kept, rows = 2 * 2 * 2 * tokens * (6 + 16), 2 * 2 * 2 * 10  # rows, layers, heads; dk + Dv; D - dk
    room = 8 if generated == "keep" else 0  # what is kept whole grows
    order = 2 * 2 * 16 * 2  # of the channels, in 8 bytes each
    assert past.get_seq_length() == tokens
    assert kept + (whole + spare) * rows <= past.nbytes / 4 <= kept * 1.008 + (whole + spare + room) * rows + order + 8
    assert past.nbytes / 4 <= (kept + (whole + room) * rows) * 1.02
    assert grace_opt.runtime.full_cache_nbytes(past) == 2 * 2 * 2 * tokens * 32 * 4


def test_cache_operations_follow_the_batch() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=2)
    ids, attended = prompts()

    def prefilled(rows: torch.Tensor) -> PrunedCache:
        past = grace_opt.runtime.cache(mask, model)
        with torch.inference_mode():
            model(input_ids=ids[rows], attention_mask=attended[rows], past_key_values=past)
        return past

    def assert_equal(one: PrunedCache, other: PrunedCache) -> None:
        for a, b in zip(one.layers, other.layers, strict=True):
            assert isinstance(a, PrunedLayer)
            assert isinstance(b, PrunedLayer)
            for x, y in zip(a.tensors(), b.tensors(), strict=True):
                torch.testing.assert_close(x, y)

    for change, rows in (
        (lambda past: past.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda past: past.batch_select_indices(torch.tensor([1])), [1]),
    ):
        past = prefilled(torch.arange(3))
        change(past)
        assert_equal(past, prefilled(torch.tensor(rows)))
    past = prefilled(torch.arange(3))
    past.reset()
    assert past.get_seq_length() == 0
    assert past.nbytes == 0


def test_half_precision_stays_close_to_the_reference() -> None:
    model = tiny_model("Llama", initializer_range=0.05).to(torch.bfloat16)
    mask = random_mask(model, 8, recent_window=4, sinks=2)
    ids, _ = prompts()
    past = grace_opt.runtime.cache(mask, model)

    def logits(past: Any) -> torch.Tensor:
        with torch.no_grad():
            steps = [model(input_ids=ids[:, :10], past_key_values=past).logits[:, -1:]]
            steps += [model(input_ids=ids[:, t : t + 1], past_key_values=past).logits for t in range(10, 21)]
        return torch.cat(steps, 1)

    pruned = logits(past)
    use_zero_channel_attention(model, mask)
    torch.testing.assert_close(pruned, logits(DynamicCache(config=model.config)), atol=0.05, rtol=0.05)
    assert all(tensor.dtype in (torch.bfloat16, torch.int64) for tensor in past.layers[0].tensors())


def test_gradients_and_inference_mode_may_alternate() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=2)
    ids, _ = prompts()
    past = grace_opt.runtime.cache(mask, model)
    with torch.inference_mode():
        model(input_ids=ids.repeat(1, 10), past_key_values=past)
        model(input_ids=ids[:, :1], past_key_values=past)
    with torch.no_grad():
        for step in range(3):
            model(input_ids=ids[:, step : step + 1], past_key_values=past)
    past = grace_opt.runtime.cache(mask, model)
    total = sum(model(input_ids=ids[:, a : a + 5], past_key_values=past).logits.sum() for a in (0, 5, 10))
    total.backward()


@pytest.mark.parametrize("lowest", [-1e4, -1e9])
def test_an_additive_mask_finds_the_same_sinks(lowest: float) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=2, sinks=2)
    ids, attended = prompts()
    results = []
    for additive in (False, True):
        past = grace_opt.runtime.cache(mask, model)
        pieces = []
        for low, high in ((0, 18), (18, 19), (19, 20)):
            visible = (torch.arange(high) <= torch.arange(low, high)[:, None]) & attended[:, None, None, :high].bool()
            given_mask = torch.zeros(visible.shape).masked_fill(~visible, lowest) if additive else visible
            positions = (attended.cumsum(-1) - 1).clamp(min=0)[:, low:high]
            with torch.no_grad():
                out = model(
                    input_ids=ids[:, low:high], attention_mask=given_mask, position_ids=positions, past_key_values=past
                )
            pieces.append(out.logits[:, -1])
        results.append(torch.stack(pieces))
    assert_logits(results[0], results[1])


def test_a_switched_attention_function_is_a_sentence_not_a_wrong_number() -> None:
    model = tiny_model("Llama")
    past = grace_opt.runtime.cache(random_mask(model, 6, recent_window=3, sinks=0), model)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        with pytest.raises(InputError, match=r"set_attn_implementation\('grace_opt'\)"):
            run(model, past)
        past.reset()


def test_what_the_runtime_cannot_do_yet_is_said() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=0)
    with pytest.raises(InputError, match="pruned prefill"):
        grace_opt.runtime.cache(replace(mask, prefill="pruned"), model)
    mixed = tiny_model("Gemma3Text")
    whole = random_mask(tiny_model("Llama"), 6, recent_window=3, sinks=0)
    with pytest.raises(InputError, match="layer 0 of this model needs a DynamicSlidingWindowLayer"):
        grace_opt.runtime.cache(whole, mixed)


def test_models_that_cannot_be_pruned_are_refused_in_a_sentence() -> None:
    from transformers import GPTJConfig, GPTJForCausalLM, T5Config, T5ForConditionalGeneration

    mask = random_mask(tiny_model("Llama"), 6, recent_window=3, sinks=0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(InputError, match="encoder-decoder"):
        grace_opt.runtime.cache(mask, t5)
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=2, rotary_dim=8))
    with pytest.raises(InputError, match="does not use transformers' attention interface"):
        grace_opt.runtime.cache(mask, gptj)
    softcapped = tiny_model("Gemma2", head_dim=16, layer_types=["full_attention"] * 2)
    with pytest.raises(InputError, match="softcap"):
        run(softcapped, grace_opt.runtime.cache(random_mask(softcapped, 6, recent_window=3, sinks=0), softcapped))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=0)
    with pytest.raises(InputError, match="made for 'tiny'.*16 channels, and these have 32"):
        grace_opt.runtime.cache(mask, tiny_model("Gemma"))
    with pytest.raises(InputError, match="has a layer 1, and the model has 1"):
        grace_opt.runtime.cache(mask, tiny_model("Llama", num_hidden_layers=1))
    with pytest.raises(InputError, match="2 KV heads of 16 key channels in layer 0, the model has 4 of 16"):
        run(model4 := tiny_model("Llama", num_key_value_heads=4), grace_opt.runtime.cache(mask, model4))
