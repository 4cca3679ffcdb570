"""Token policies with scores, alone and composed, in the real cache, beside dense attention under their masks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import grace_opt.runtime
from grace_opt import InputError
from grace_opt.compression.apply import apply, online
from grace_opt.compression.budget import Budget
from grace_opt.compression.codec import Codec
from grace_opt.compression.integers import GROUP
from grace_opt.compression.method import Windows, method
from grace_opt.compression.pays import held_bytes
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.base import Tier, TokenRule
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.replay import replay
from grace_opt.graphs.observed import Observed
from grace_opt.models.attention import register
from grace_opt.runtime.cache import cache_nbytes
from grace_opt.runtime.ragged import RaggedLayer
from tests.support.families import tiny_model
from tests.support.generation import logits_of, random_mask
from tests.support.slack import assert_logits

SINKS, RECENT, QUERIES, PROMPT, LONG = 2, 4, 6, 90, 104
NAMES = ["snapkv", "pyramidkv", "adakv", "h2o", "tova", "knorm", "keydiff", "expected-attention"]
EIGHT = ["Llama", "Qwen2", "Qwen3", "Gemma", "Gemma3Text", "GPTNeoX", "OPT", "StableLm"]


def planned(model: Any, name: str, share: float, *, width: int | None = None, bits: int = 0, **more: Any) -> CachePlan:
    """A policy over random channels with random read-outs, or over whole tokens (``width`` None)."""
    generated = more.pop("generated", "keep")
    mask = random_mask(
        model, width or 8, values=width or 8, recent_window=RECENT, sinks=SINKS, generated=generated, readout="static",
        **more,
    )  # fmt: skip
    policy = POLICIES[name]()
    shares = policy.layer_shares(share, len(mask.plan.layers))
    layers = {
        i: replace(each, tokens=TokenRule(policy, of_layer), queries=QUERIES, codecs=each.codecs if width else {})
        for (i, each), of_layer in zip(mask.plan.layers.items(), shares, strict=True)
    }
    return CachePlan(layers).changed(bits={"key": bits, "value": bits} if bits else None)


def padded() -> tuple[Tensor, Tensor]:
    """Three rows; of a prompt of 90 tokens, padding on the left leaves 70, 90 and 5: the last has no old token."""
    ids = torch.randint(3, 99, (3, LONG), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, :20] = 0
    attended[2, :85] = 0
    return ids, attended


class Oracle:
    """Dense attention over a plain cache, in which each KV head sees what its policy keeps, as its codec reads it."""

    def __init__(self, plan: CachePlan, attended: Tensor) -> None:
        self.plan, self.attended = plan, attended
        self.tiers: dict[tuple[int, int], Tensor] = {}  # (layer, row) -> int8[H, prompt], of the prompt's own tokens

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, given: Any, scaling: Any = None, **more: Any
    ) -> Any:
        rows, heads, new, dim = query.shape
        tokens, at = key.shape[2], module.layer_idx
        group, scaling = heads // key.shape[1], dim**-0.5 if scaling is None else scaling
        layer = self.plan.layers.get(at)
        if layer is None:  # a sliding window
            return sdpa_attention_forward(module, query, key, value, given, scaling=scaling, **more)
        seen = torch.arange(tokens) <= torch.arange(tokens - new, tokens)[:, None]
        visible = (seen & self.attended[:, None, :tokens].bool())[:, None].repeat(1, key.shape[1], 1, 1)
        sides: list[tuple[Tensor, Tensor]] = [(key, key), (value, value)]
        whole = torch.ones_like(visible)
        if tokens == new:
            self._choose(layer, query, key, value, scaling)
        else:
            sides = [(states, self._read(layer, i, states)) for i, states in enumerate((key, value))]
            for row in range(rows):
                for head in range(key.shape[1]):
                    self._mask(layer, row, head, visible[row, head], whole[row, head])
        (k, k_read), (v, v_read) = (tuple(x.repeat_interleave(group, 1) for x in pair) for pair in sides)
        here, visible = (each.repeat_interleave(group, 1) for each in (whole, visible))
        scores = torch.where(here, query @ k.mT, query @ k_read.mT) * scaling
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        out = (weights * here) @ v + (weights * ~here) @ v_read
        return out.transpose(1, 2).contiguous(), None

    def first(self, row: int) -> int:
        return int((1 - self.attended[row, :PROMPT]).sum())

    def _choose(self, layer: LayerPlan, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        assert layer.tokens is not None
        for row in range(len(query)):
            first = self.first(row)
            tiers = torch.full(key.shape[1:3], int(Tier.WHOLE), dtype=torch.int8)
            if PROMPT - first > SINKS + RECENT:
                count = min(QUERIES, PROMPT - first)
                seen = Observed(
                    query[row, :, -count:], key[row, :, first:], value[row, :, first:], scaling, SINKS, RECENT
                )
                said = layer.tokens.policy.tiers(seen, layer.tokens.share)
                tiers[:, first + SINKS : PROMPT - RECENT] = said[..., SINKS : PROMPT - RECENT - first]
            self.tiers[layer.index, row] = tiers

    def _mask(self, layer: LayerPlan, row: int, head: int, visible: Tensor, whole: Tensor) -> None:
        """bool[new, T] in place: what the row's last queries see, and see whole."""
        tiers, first = self.tiers[layer.index, row][head], self.first(row)
        new, tokens = visible.shape
        visible[:, :PROMPT] &= tiers != Tier.DROPPED
        whole[:, :PROMPT] &= tiers == Tier.WHOLE
        if layer.windows.generated == "prune":
            age = torch.arange(tokens - new, tokens)[:, None] - torch.arange(tokens)
            is_sink = torch.arange(tokens) < first + SINKS
            whole &= is_sink | (age < RECENT)

    def _read(self, layer: LayerPlan, side: int, states: Tensor) -> Tensor:
        """[B, H, T, n]: every token as its codec gives it back; of integers, whole blocks of those that stay."""
        codecs = layer.codecs.get(("key", "value")[side])
        if codecs is None:
            return states
        if len(codecs) < states.shape[1]:  # integers alone, of whatever heads there are
            codecs = [codecs[0].sized(states.shape[3])] * states.shape[1]
        read = torch.stack([c.read(c.encode(states[:, h]), None) for h, c in enumerate(codecs)], dim=1)
        for row in range(len(states)) if codecs[0].block else ():
            for head, codec in enumerate(codecs):
                self._round(read[row, head], codec, states[row, head], self.tiers[layer.index, row][head], row)
        return read

    def _round(self, read: Tensor, codec: Codec, states: Tensor, tiers: Tensor, row: int) -> None:
        kept = (tiers == Tier.COMPRESSED).nonzero()[:, 0]
        spare = min(RECENT, 32)
        packed = kept[: max(0, len(kept) - spare) // GROUP * GROUP]
        if len(packed):
            read[packed] = codec.read(codec.stored(codec.encode(states[packed])), None)


def both(model: Any, plan: CachePlan, chunks: list[int]) -> tuple[list[Tensor], list[Tensor], Any]:
    ids, attended = padded()
    past = grace_opt.runtime.cache(plan, model)
    ours = logits_of(model, past, chunks, ids, attended)
    past.release()
    register("dense_policy", Oracle(plan, attended))
    model.set_attn_implementation("dense_policy")
    return ours, logits_of(model, DynamicCache(config=model.config), chunks, ids, attended), past


def check(model: Any, plan: CachePlan, chunks: list[int]) -> Any:
    ours, theirs, past = both(model, plan, chunks)
    for mine, other in zip(ours, theirs, strict=True):
        assert_logits(mine, other)
    assert past.get_seq_length() == sum(chunks)
    return past


SINGLY, CHUNKS = [PROMPT, *[1] * 12], [PROMPT, 1, 5, 1, 3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [None, 7], ids=["whole", "channels"])
def test_dense_attention_under_the_policys_mask_is_the_same(name: str, width: int | None) -> None:
    for generated, chunks in (("keep", CHUNKS), ("prune", SINGLY)):
        model = tiny_model("Llama")
        past = check(model, planned(model, name, 0.3, width=width, generated=generated), chunks)
        assert isinstance(past.layers[0], RaggedLayer) == POLICIES[name].per_head


@pytest.mark.parametrize("family", EIGHT)
@pytest.mark.parametrize("name", ["adakv", "snapkv"])
def test_in_eight_families(family: str, name: str) -> None:
    for width in (None, 7):
        model = tiny_model(family, max_position_embeddings=512)
        check(model, planned(model, name, 0.4, width=width), CHUNKS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [None, 7], ids=["whole", "channels"])
def test_integers_of_what_stays(name: str, width: int | None) -> None:
    model = tiny_model("Llama", initializer_range=0.1)
    past = check(model, planned(model, name, 0.6, width=width, bits=8), CHUNKS)
    layer = past.layers[0]
    part = layer.parts[0] if isinstance(layer, RaggedLayer) else layer
    assert part.key_side.buffer.packed_tokens > 0


def test_heads_of_several_widths_with_tokens_of_their_own() -> None:
    model = tiny_model("Llama")
    check(model, planned(model, "adakv", 0.3, width=7, ragged=True), CHUNKS)
    model = tiny_model("Llama")
    check(model, planned(model, "tova", 0.3, width=7, ragged=True), CHUNKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_one_is_the_plain_model(name: str) -> None:
    model = tiny_model("Llama")
    ids, attended = padded()
    expected = logits_of(model, DynamicCache(config=model.config), CHUNKS, ids, attended)
    with grace_opt.runtime.cache(planned(model, name, 1.0), model) as past:
        ours = logits_of(model, past, CHUNKS, ids, attended)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_logits(mine, theirs)


IDS = torch.randint(3, 99, (600,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("share", [0.6, 0.2])
@pytest.mark.parametrize("end", ["", "+int4", "+think", "+grace-opt+int4"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_formula(name: str, end: str, share: float) -> None:
    model = tiny_model("Llama", max_position_embeddings=1024)
    composed = method(name + end, {"recent_window": 16, "token_share": share, "observation_window": 16})
    with torch.inference_mode():
        captured = capture(model, IDS, 600, 16)
        seen = captured.observed(16, composed.windows, 2)
        plan = apply(composed, seen, Budget(0.5, 0.5))
        shapes: Any = {"key": (2, 16), "value": (2, 16)}
        assert all(each.tokens is not None for each in plan)
        expected = sum(held_bytes(each, shapes, 600, 4, each.tokens.kept(seen[each.index])) for each in plan)
        with replay(captured, plan) as past:
            assert cache_nbytes(past) == pytest.approx(expected, rel=0.01)
            assert cache_nbytes(past) < (share + 0.1 + 0.1 * bool(end)) * cache_nbytes(captured.past)


@pytest.mark.parametrize("name", ["snapkv", "adakv+int4", "pyramidkv", "tova+int8", "streaming+int4"])
def test_a_share_is_what_the_cache_holds(name: str) -> None:
    model = tiny_model("Llama", max_position_embeddings=1024)
    composed = method(name, {"recent_window": 16, "observation_window": 16})
    with torch.inference_mode():
        captured = capture(model, IDS, 600, 16)
        plan = apply(composed, captured.observed(16, composed.windows, 2), Budget(share=0.25))
        with replay(captured, plan) as past:
            assert cache_nbytes(past) / cache_nbytes(captured.past) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("name", ["snapkv+grace-opt", "adakv+grace-opt+int4", "tova+think", "keydiff+kq-svd"])
def test_each_prompt_chooses_tokens_and_channels_layer_by_layer(name: str) -> None:
    """What a layer chooses right after its attention is what the whole prompt's plan says, at equal widths."""
    model = tiny_model("Llama", max_position_embeddings=1024)
    options = {"recent_window": 16, "token_share": 0.4, "observation_window": 16, "budget": "uniform"}
    composed = method(name, options)
    with torch.inference_mode():
        captured = capture(model, IDS, 300, 16)
        layers = captured.observed(16, composed.windows, composed.selection.spans)
        found = []
        for plan in (apply(composed, layers, Budget(0.5, 0.25)), online(composed, [0, 1], Budget(0.5, 0.25))):
            with replay(captured, plan) as past:
                last = torch.tensor([IDS[300:301]])
                found.append((cache_nbytes(past), model(input_ids=last, past_key_values=past).logits))
    (bytes_a, logits_a), (bytes_b, logits_b) = found
    assert bytes_a == pytest.approx(bytes_b, rel=0.01)
    assert_logits(logits_a, logits_b)


@pytest.mark.parametrize("name", ["adakv", "snapkv"])
def test_cache_operations_follow_each_heads_tokens(name: str) -> None:
    model = tiny_model("Llama")
    ids, attended = padded()
    plan = planned(model, name, 0.3, width=7)
    expected = logits_of(model, grace_opt.runtime.cache(plan, model), [PROMPT, *[1] * 5], ids, attended)
    past = grace_opt.runtime.cache(plan, model)
    logits_of(model, past, [PROMPT, 1, 1], ids, attended)
    past.crop(-2)
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    rows = torch.tensor([2, 2, 1, 1, 0, 0])
    ours = logits_of(model, past, [1] * 5, ids[rows], attended[rows])
    for mine, theirs in zip(ours, expected[1:], strict=True):
        assert_logits(mine, theirs[rows])
    with pytest.raises(InputError, match="cannot be taken back"):
        past.crop(-6)
    past.reset()
    again = logits_of(model, past, [PROMPT, 1], ids[:1], attended[:1])
    assert_logits(again[1], expected[1][:1])


def test_a_row_of_a_padded_batch_is_as_alone() -> None:
    model = tiny_model("Llama")
    ids, attended = padded()
    plan = planned(model, "adakv", 0.3, width=7)
    run = partial(logits_of, model, chunks=[PROMPT, 1, 1])
    together = run(past=grace_opt.runtime.cache(plan, model), ids=ids, attended=attended)
    alone = logits_of(model, grace_opt.runtime.cache(plan, model), [70, 1, 1], ids[:1, 20:], attended[:1, 20:])
    for mine, theirs in zip(alone[1:], together[1:], strict=True):
        assert_logits(mine, theirs[:1])


def test_windows_longer_than_a_prompt_leave_it_whole() -> None:
    model = tiny_model("Llama")
    plan = planned(model, "snapkv", 0.3)
    long = CachePlan({i: replace(each, windows=Windows(SINKS, 200, "keep")) for i, each in plan.layers.items()})
    ids, attended = padded()
    expected = logits_of(model, DynamicCache(config=model.config), CHUNKS, ids, attended)
    with grace_opt.runtime.cache(long, model) as past:
        for mine, theirs in zip(logits_of(model, past, CHUNKS, ids, attended), expected, strict=True):
            assert_logits(mine, theirs)
