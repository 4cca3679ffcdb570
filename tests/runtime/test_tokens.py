"""Token policies in the real cache, beside dense attention in which what was dropped is masked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt import InputError
from grace_opt.compression.apply import online
from grace_opt.compression.budget import Budget
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import method
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.base import Tier, TokenPolicy, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.graphs.observed import Observed
from grace_opt.models.attention import register
from grace_opt.testing.policies import check_policy
from tests.support.families import tiny_model
from tests.support.generation import assert_same, logits_of, random_mask
from tests.support.slack import assert_logits

SINKS, RECENT = 2, 4


@POLICIES.register
@dataclass(frozen=True)
class EveryThird(TokenPolicy):
    """Outside the package: of three old tokens one is whole, one compressed, one dropped, as far as the share goes."""

    whole: bool = True

    name: ClassVar[str] = "every-third"

    def tiers(self, seen: Observed, share: float) -> Tensor:
        tiers = torch.zeros(seen.keys.shape[1], dtype=torch.int8)
        old = torch.arange(seen.prunable.start, seen.prunable.stop)
        if share == 1:
            tiers[old] = Tier.COMPRESSED
            return tiers
        tiers[old[old % 3 == 0]] = Tier.COMPRESSED
        tiers[old[old % 3 == 1]] = Tier.WHOLE if self.whole else Tier.COMPRESSED
        tiers[old[int(share * len(old)) :]] = Tier.DROPPED
        return tiers


def test_the_kit_passes_for_a_policy_from_outside() -> None:
    check_policy(EveryThird())
    check_policy(EveryThird(whole=False))


def planned(model: Any, policy: TokenPolicy, share: float, **options: Any) -> KVMask:
    mask = random_mask(model, 7, values=9, recent_window=RECENT, sinks=SINKS, **options)
    rule = TokenRule(policy, share)
    return replace(mask, plan=CachePlan({i: replace(each, tokens=rule) for i, each in mask.plan.layers.items()}))


def dense(model: Any, mask: KVMask, attended: Tensor, prompt: int) -> None:
    """Make the model attend densely over a plain cache, tokens read as their tier says, dropped ones masked.

    Tiers are those of the prompt's own first update, row by row, by definition. Tokens of one update see each other
    whole; a sliding policy drops for all of them what is out of the first one's reach.
    """

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, given: Any, scaling: Any = None, **_: Any
    ) -> Any:
        rows, heads, new, dim = query.shape
        tokens, layer = key.shape[2], mask.plan.layers[module.layer_idx]
        visible = torch.ones(rows, new, tokens, dtype=torch.bool)
        visible &= torch.arange(tokens) <= torch.arange(tokens - new, tokens)[:, None]
        visible &= attended[:, None, :tokens].bool()
        whole = torch.ones(rows, new, tokens, dtype=torch.bool)
        assert layer.tokens is not None
        for row in range(rows if tokens > prompt else 0):
            first = int((1 - attended[row, :prompt]).sum())
            old = prompt - first > SINKS + RECENT
            tiers = torch.full((tokens,), int(Tier.WHOLE))
            if old:
                seen = Observed(
                    query[row, :, :1], key[row, :, first:prompt], value[row, :, first:prompt], 0.25, SINKS, RECENT
                )
                part = seen.prunable
                tiers[first:prompt][part] = layer.tokens.policy.tiers(seen, layer.tokens.share)[part].long()
            reach = int((tiers[first + SINKS : prompt] != Tier.DROPPED).sum())
            for at in range(new):
                position = tokens - new + at
                for token in range(first, position + 1):
                    age, prompt_token = position - token, token < prompt
                    tier = Tier(int(tiers[token]))
                    if layer.windows.generated == "prune" and not (prompt_token and tier is Tier.DROPPED):
                        outside = token - first >= SINKS
                        in_old = old and prompt_token and first + SINKS <= token < prompt - RECENT
                        if outside and layer.tokens.policy.slides:
                            came = new > 1 and token >= tokens - new
                            tier = Tier.WHOLE if in_old or age < RECENT or came else Tier.COMPRESSED
                            tier = tier if tokens - new - token < max(reach, RECENT) else Tier.DROPPED
                        elif outside and not in_old:
                            tier = (
                                Tier.WHOLE
                                if age < RECENT or (token >= tokens - new > prompt - 1 and new > 1)
                                else Tier.COMPRESSED
                            )
                    visible[row, at, token] &= tier is not Tier.DROPPED
                    whole[row, at, token] = tier is Tier.WHOLE
        group = heads // key.shape[1]
        sides = []
        for kind, states in (("key", key), ("value", value)):
            codecs = layer.codecs.get(kind)  # type: ignore[call-overload]
            if codecs is None:
                sides.append((states, states))
                continue
            read = torch.stack([c.read(c.encode(states[:, h]), None) for h, c in enumerate(codecs)], dim=1)
            sides.append((states, read))
        (k, k_read), (v, v_read) = (tuple(x.repeat_interleave(group, 1) for x in pair) for pair in sides)
        here = whole[:, None]
        scores = torch.where(here, query @ k.mT, query @ k_read.mT) * (dim**-0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        out = (weights * here) @ v + (weights * ~here) @ v_read
        return out.transpose(1, 2).contiguous(), None

    register("dense_tokens", attend)
    model.set_attn_implementation("dense_tokens")


def padded() -> tuple[Tensor, Tensor]:
    """Three rows of 50 tokens; padding on the left leaves 19, 30 and 4 of a prompt of 30: the last has no old token."""
    ids = torch.randint(3, 99, (3, 50), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, :11] = 0
    attended[2, :26] = 0
    return ids, attended


RULES = pytest.mark.parametrize(
    ("policy", "share"), [(Streaming(), 0.4), (EveryThird(), 0.7), (EveryThird(whole=False), 0.9)], ids=str
)
GENERATED = pytest.mark.parametrize("generated", ["keep", "prune"])


@GENERATED
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chunks", [[30, *[1] * 12], [30, 1, 5, 1, 1, 3, 1]], ids=["singly", "chunks"])
@RULES
def test_dense_attention_with_dropped_tokens_masked_is_the_same(
    policy: TokenPolicy, share: float, chunks: list[int], ragged: bool, generated: str
) -> None:
    model = tiny_model("Llama")
    mask = planned(model, policy, share, readout="static", ragged=ragged, generated=generated)
    ids, attended = padded()
    past = grace_opt.runtime.cache(mask, model)
    ours = logits_of(model, past, chunks, ids, attended)
    assert past.get_seq_length() == 42
    dense(model, mask, attended, 30)
    theirs = logits_of(model, DynamicCache(config=model.config), chunks, ids, attended)
    for mine, other in zip(ours, theirs, strict=True):
        assert_logits(mine, other)


@GENERATED
@pytest.mark.parametrize("offload", [False, True])
@RULES
def test_beams_take_their_tokens_along(policy: TokenPolicy, share: float, offload: bool, generated: str) -> None:
    model = tiny_model("Llama")
    mask = planned(model, policy, share, readout="static", generated=generated)
    ids, attended = (each[:, :30] for each in padded())

    def run(past: Any) -> Any:
        return model.generate(
            ids,
            attention_mask=attended,
            past_key_values=past,
            max_new_tokens=14,
            num_beams=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )

    ours = run(grace_opt.runtime.cache(mask, model, offload=offload))
    dense(model, mask, torch.cat([attended, torch.ones(3, 14).long()], 1).repeat_interleave(3, 0), 30)
    assert_same(ours, run(DynamicCache(config=model.config)))


@GENERATED
def test_integers_hold_the_tokens_that_stay(generated: str) -> None:
    model = tiny_model("Llama", max_position_embeddings=512, initializer_range=0.1)
    mask = planned(model, EveryThird(), 0.8, readout="static", generated=generated)
    ids = torch.randint(3, 99, (3, 180), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, :37] = 0
    attended[2, :50] = 0
    chunks = [150, *[1] * 20, 10]
    exact, rounded = (
        logits_of(model, past := grace_opt.runtime.cache(mask, model, **bits), chunks, ids, attended)
        for bits in ({}, {"key_bits": 8, "value_bits": 8})
    )
    torch.testing.assert_close(torch.cat(rounded[1:]), torch.cat(exact[1:]), atol=0.03, rtol=0)
    assert (torch.cat(rounded[1:]) - torch.cat(exact[1:])).abs().max() > 0
    assert past.layers[0].key_side.buffer.packed_tokens > 0


def test_bytes_go_down_and_lengths_stay_logical() -> None:
    model = tiny_model("Llama", max_position_embeddings=512)
    ids = torch.randint(3, 99, (1, 400))
    sizes = {}
    for share in (1.0, 0.5, 0.1):
        with grace_opt.runtime.cache(planned(model, Streaming(), share), model) as past, torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            sizes[share] = past.nbytes
            assert past.get_seq_length() == 400
            assert grace_opt.runtime.full_cache_nbytes(past) >= 400 * 2 * 2 * 32 * 4
    assert sizes[0.5] < 0.6 * sizes[1.0]
    assert sizes[0.1] < 0.25 * sizes[1.0]


def test_a_sliding_policy_holds_no_more_as_tokens_come() -> None:
    model = tiny_model("Llama", max_position_embeddings=512)
    ids = torch.randint(3, 99, (1, 100))
    past = grace_opt.runtime.cache(planned(model, Streaming(), 0.2), model)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
        held = past.layers[0].length
        for at in range(60):
            model(input_ids=ids[:, at : at + 1], past_key_values=past)
    assert (past.get_seq_length(), past.layers[0].length) == (160, held)
    with pytest.raises(InputError, match="cannot be taken back"):
        past.crop(-1)


def test_integers_beams_crop_and_choice_from_the_prompt() -> None:
    model = tiny_model("Llama", max_position_embeddings=512, initializer_range=0.1)
    ids = torch.randint(3, 99, (2, 150), generator=torch.Generator().manual_seed(1))
    common: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = planned(model, EveryThird(), 0.8, generated="keep")
    exact, rounded = (
        model.generate(ids, past_key_values=grace_opt.runtime.cache(mask, model, **bits), num_beams=2, **common)
        for bits in ({}, {"key_bits": 8, "value_bits": 8})
    )
    assert (exact == rounded).float().mean() > 0.9
    past = grace_opt.runtime.cache(mask, model)
    attended = torch.ones_like(ids)
    expected = logits_of(model, past, [100, 1, 1, 1], ids, attended)[1:]
    past.crop(-3)
    again = torch.cat([ids[:, :0], ids], 1)
    with torch.no_grad():
        found = [
            model(input_ids=again[:, at : at + 1], past_key_values=past, position_ids=torch.full((2, 1), at)).logits[
                :, 0
            ]
            for at in range(100, 103)
        ]
    for mine, theirs in zip(found, expected, strict=True):
        assert_logits(mine, theirs)
    with pytest.raises(InputError, match="cannot be taken back, only 3"):
        past.crop(-4)
    chosen = method("grace-opt", {"tokens": "every-third", "token_share": 0.6, "recent_window": 4, "sinks": 2})
    plan = online(chosen, [0, 1], Budget(0.5, 0.2))
    assert model.generate(ids, past_key_values=grace_opt.runtime.cache(plan, model), **common).shape == (2, 162)


@GENERATED
@pytest.mark.parametrize("ragged", [False, True])
def test_cropped_tokens_might_never_have_come(ragged: bool, generated: str) -> None:
    model = tiny_model("Llama")
    mask = planned(model, EveryThird(), 0.7, readout="static", ragged=ragged, generated=generated)
    ids, attended = padded()
    expected = logits_of(model, grace_opt.runtime.cache(mask, model), [30, *[1] * 8, 4], ids, attended)
    past = grace_opt.runtime.cache(mask, model)
    logits_of(model, past, [30, *[1] * 8, 3], ids, attended)
    past.crop(-RECENT)
    assert past.get_seq_length() == 37
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    for part, theirs in ((slice(37, 38), expected[8]), (slice(38, 42), expected[9])):
        with torch.no_grad():
            mine = model(
                input_ids=ids[:, part],
                attention_mask=attended[:, : part.stop],
                position_ids=positions[:, part],
                past_key_values=past,
            ).logits
        assert_logits(mine.flatten(0, 1), theirs)


@RULES
def test_cache_operations_follow_the_batch(policy: TokenPolicy, share: float) -> None:
    model = tiny_model("Llama")
    mask = planned(model, policy, share, readout="static")
    ids, attended = padded()

    def after(change: Any, rows: list[int]) -> Tensor:
        """Logits after the prompt, of a cache that was changed so that it has these rows."""
        past = grace_opt.runtime.cache(mask, model)
        logits_of(model, past, [30], ids, attended)
        change(past)
        with torch.no_grad():
            steps = [
                model(input_ids=ids[rows, at : at + 1], attention_mask=attended[rows, : at + 1], past_key_values=past)
                for at in range(30, 37)
            ]
        return torch.cat([step.logits for step in steps], 1)

    plain = after(lambda past: None, [0, 1, 2])
    for change, rows in (
        (lambda past: past.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda past: past.batch_select_indices(torch.tensor([1])), [1]),
    ):
        assert_logits(after(change, rows), plain[rows])


@RULES
def test_without_a_mask_no_token_sees_a_later_one(policy: TokenPolicy, share: float) -> None:
    """Rows of which different numbers of tokens stay, several new tokens at once, and no mask from the model."""
    from grace_opt.runtime.attention import attention

    @dataclass(frozen=True)
    class ByRow(TokenPolicy):
        name: ClassVar[str] = "by-row"

        def tiers(self, seen: Observed, share: float) -> Tensor:
            return policy.tiers(seen, share if seen.keys[0, 0, 0] > 0 else share / 2)

    model = tiny_model("Llama")
    module = model.model.layers[0].self_attn
    rng = torch.Generator().manual_seed(0)
    states = [torch.randn(2, heads, 40, 16, generator=rng) for heads in (4, 2, 2)]
    states[1][:, :, 0] = torch.tensor([1.0, -1.0])[:, None, None]
    found = []
    for masked in (True, False):
        layer = grace_opt.runtime.cache(planned(model, ByRow(), share, generated="keep"), model).layers[0]
        for low, high in ((0, 35), (35, 40)):
            query, key, value = (each[:, :, low:high] for each in states)
            seen = (torch.arange(high) <= torch.arange(low, high)[:, None])[None, None].expand(2, -1, -1, -1)
            out, _ = attention(module, query, *layer.update(key, value), seen if masked or low == 0 else None)
        found.append(out)
    assert layer.slots is not None
    assert (layer.slots.positions < 0).any()
    torch.testing.assert_close(*found)


def test_what_cannot_be_is_a_sentence() -> None:
    @dataclass(frozen=True)
    class Short(TokenPolicy):
        name: ClassVar[str] = "short"

        def tiers(self, seen: Observed, share: float) -> Tensor:
            return torch.ones(3)

    model = tiny_model("Llama")
    ids = torch.randint(3, 99, (1, 60))
    with pytest.raises(InputError, match="token policy 'short' must give 60 tiers"), torch.no_grad():
        model(input_ids=ids, past_key_values=grace_opt.runtime.cache(planned(model, Short(), 0.5), model))
    with pytest.raises(InputError, match="a token policy needs a cache that grows"):
        grace_opt.runtime.cache(planned(model, Streaming(), 0.5), model, max_length=80)
    mask = planned(model, Streaming(), 0.5)
    with pytest.raises(InputError, match="'streaming' drops tokens one by one .* integers are held in blocks"):
        grace_opt.runtime.cache(mask, model, key_bits=4, value_bits=4)
    past = grace_opt.runtime.cache(mask, model, key_bits=4, value_bits=4, generated="keep")
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            model(input_ids=part, past_key_values=past)
    streaming = method("streaming", {"key_bits": 4, "generated": "prune"})
    with pytest.raises(InputError, match="integers are held in blocks"):
        grace_opt.runtime.online_cache(model, streaming, ratio=0.5, value_ratio=0.5)


def test_whole_tokens_that_stay_may_be_integers() -> None:
    """A policy alone leaves no codec to take the number of heads from, in a plan and where each prompt chooses."""
    model = tiny_model("Llama", max_position_embeddings=512)
    ids = torch.randint(3, 99, (1, 200))
    streaming = method("streaming", {"recent_window": 4, "sinks": 2})
    plan = online(streaming, [0, 1], Budget(0.4, 0.4))
    fixed = CachePlan({i: replace(each, choice=None) for i, each in plan.layers.items()})
    for each in (plan, fixed):
        sizes = []
        for bits in ({}, {"key_bits": 4, "value_bits": 4}):
            with grace_opt.runtime.cache(each, model, **bits) as past, torch.no_grad():
                model(input_ids=ids, past_key_values=past)
                model(input_ids=ids[:, :1], past_key_values=past)
                sizes.append(past.nbytes)
                assert past.layers[0].length < 130
        assert sizes[1] < 0.75 * sizes[0]
