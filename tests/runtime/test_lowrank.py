"""Projections in the real cache, beside dense attention over projected tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.mask import KVMask
from grace_opt.compression.plan import CachePlan
from grace_opt.runtime.kernels import choose
from grace_opt.runtime.ragged import RaggedLayer
from tests.support.families import tiny_model
from tests.support.generation import assert_same, compare, prompts, random_mask, run
from tests.support.slack import assert_logits

WAYS = pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
STATIC = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def projections(model: Any, rank: int, *, turned: bool = True, ragged: bool = False, **windows: Any) -> KVMask:
    """A mask of random projections: ``turned``: in orthogonal bases, or in any; ``ragged``: ranks differ by head."""
    rng = torch.Generator().manual_seed(0)

    def codec(n: int, width: int) -> LowRank:
        basis = torch.linalg.qr(torch.randn(n, n, generator=rng))[0].contiguous()
        constant = torch.randn(n - width, generator=rng)
        if turned:
            return LowRank(basis, constant)
        basis = basis * torch.linspace(0.5, 2, n)[:, None]
        return LowRank(basis, constant, torch.linalg.inv(basis))

    mask = random_mask(model, rank, values=rank, ragged=ragged, **windows)
    layers = {
        i: replace(
            layer,
            codecs={kind: [codec(each.n, each.width) for each in codecs] for kind, codecs in layer.codecs.items()},
        )
        for i, layer in mask.plan.layers.items()
    }
    return replace(mask, plan=CachePlan(layers))


@WAYS
@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
@pytest.mark.parametrize(("recent_window", "sinks", "turned"), [(0, 0, True), (6, 2, False), (500, 3, True)])
def test_generation_equals_attention_over_projected_tokens(
    recent_window: int, sinks: int, turned: bool, generated: str, static: bool, more: dict[str, int]
) -> None:
    model = tiny_model("Llama")
    mask = projections(model, 7, turned=turned, recent_window=recent_window, sinks=sinks, generated=generated)
    past = compare(model, mask, {"max_length": 60} if static else None, **more)
    # Growing, until a token is old; with generated tokens kept, if one of the first update is.
    seen = 44 if generated == "prune" else more.get("prefill_chunk_size", 21)
    young = seen <= recent_window + sinks and not (static and generated == "prune")
    assert past.layers[0].key_side.codec.name == ("whole" if young else "lowrank")


@STATIC
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_heads_of_different_ranks(family: str, static: bool) -> None:
    model = tiny_model(family)
    mask = projections(model, 7, turned=False, ragged=True, recent_window=4, sinks=2)
    past = compare(model, mask, {"max_length": 60} if static else None)
    assert isinstance(past.layers[-1], RaggedLayer)
    assert len(past.layers[-1].parts) == 2


def test_every_coordinate_kept_changes_nothing() -> None:
    model = tiny_model("Llama")
    past = grace_opt.runtime.cache(projections(model, 16, turned=False, recent_window=2, sinks=1), model)
    assert_same(run(model, past), run(model, None))


def test_integers_of_coordinates_are_nearly_the_same() -> None:
    model = tiny_model("Llama", max_position_embeddings=512, initializer_range=0.1)
    mask = projections(model, 10, recent_window=6, sinks=2)
    ids = torch.randint(3, 99, (2, 200), generator=torch.Generator().manual_seed(3))
    last = []
    for bits in ({}, {"key_bits": 8, "value_bits": 8}):
        past = grace_opt.runtime.cache(mask, model, **bits)
        with torch.no_grad():
            model(input_ids=ids[:, :150], past_key_values=past)
            last.append([model(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(150, 200)])
    exact, rounded = map(torch.cat, last)
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0)
    assert past.layers[0].key_side.buffer.packed_tokens > 128


@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
def test_cropped_tokens_might_never_have_come(generated: str, static: bool) -> None:
    model = tiny_model("Llama")
    mask = projections(model, 7, recent_window=6, sinks=2, generated=generated)
    ids, _ = prompts()
    options = {"max_length": 40} if static else {}

    def steps(past: Any, low: int, high: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(
                [model(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(low, high)]
            )

    pasts = [grace_opt.runtime.cache(mask, model, **options) for _ in range(2)]
    with torch.no_grad():
        for past in pasts:
            model(input_ids=ids[:, :14], past_key_values=past)
    steps(pasts[0], 0, 5)
    pasts[0].crop(-5)
    assert_logits(steps(pasts[0], 5, 12), steps(pasts[1], 5, 12))


@pytest.mark.parametrize("method", ["svd", "kq-svd"])
def test_a_prompt_is_projected_onto_its_own_best_space(method: str) -> None:
    """Each row of a batch gives what it gives alone, and the rest that is left out is the least there is."""
    from grace_opt.compression.method import method as named

    model = tiny_model("Llama")
    policy = named(method, {"recent_window": 3, "sinks": 1})
    ids, attended = prompts()
    past = grace_opt.runtime.online_cache(model, policy, ratio=0.5, value_ratio=0.5)
    together = run(model, past)
    assert choose.reasons(past.layers[0])["plain"] is True
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1, attended[row].bool()],
            past_key_values=grace_opt.runtime.online_cache(model, policy, ratio=0.5, value_ratio=0.5),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(alone[0, -24:], together.sequences[row, -24:])
    if method == "kq-svd":
        return
    codec, plain = past.layers[0].value_side.codec, DynamicCache(config=model.config)
    with torch.no_grad():
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=attended, position_ids=positions, past_key_values=plain)
    for row, head in product(range(3), range(2)):
        first = int((1 - attended[row]).sum())
        old = plain.layers[0].values[row, head, first + 1 : -3]
        centred = old - old.mean(0)
        left_out = (centred @ codec.basis[row, head, codec.width :].mT).square().sum()
        torch.testing.assert_close(left_out, torch.linalg.svdvals(centred)[codec.width :].square().sum())
