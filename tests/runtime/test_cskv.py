"""Joint ranks in the real cache, beside dense attention over explicitly rebuilt keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import grace_opt.runtime
from grace_opt.compression.cskv import Cskv
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import Windows, method
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.errors import InputError
from grace_opt.runtime import side
from grace_opt.runtime.kernels import choose
from tests.support.families import tiny_model
from tests.support.generation import assert_same, compare, prompts, run
from tests.support.slack import assert_logits

WAYS = pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
STATIC = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
# Plain, biases, QK norm, MQA, norm of the whole projection, interleaved, partial twice, layers without RoPE, no RoPE.
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Gemma", "Olmo2", "Cohere", "StableLm", "GPTNeoX", "SmolLM3", "OPT"]


def joint(
    model: Any, rank: int, *, kinds: tuple[str, ...] = ("key", "value"), factors: bool = False, **windows: Any
) -> KVMask:
    """A mask of random joint ranks in every layer; ``factors``: of no orthonormal rows, and with a constant."""
    rng, config = torch.Generator().manual_seed(0), model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    n = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def codec() -> Cskv:
        basis = torch.linalg.qr(torch.randn(heads * n, heads * n, generator=rng))[0][:rank].contiguous()
        if not factors:
            return Cskv(basis, heads)
        return Cskv(basis * 1.1 + 0.02, heads, 0.3 * torch.randn(heads * n, generator=rng))

    layers = {
        i: LayerPlan(i, {kind: [codec()] for kind in kinds}, Windows(**windows))  # type: ignore[misc]
        for i in range(config.num_hidden_layers)
    }
    return KVMask("tiny", heads, n, CachePlan(layers), num_hidden_layers=config.num_hidden_layers)


@WAYS
@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
@pytest.mark.parametrize(("recent_window", "sinks", "factors"), [(0, 0, False), (6, 2, True), (500, 3, False)])
def test_generation_equals_attention_over_what_is_rebuilt(
    recent_window: int, sinks: int, factors: bool, generated: str, static: bool, more: dict[str, int]
) -> None:
    model = tiny_model("Llama")
    mask = joint(model, 13, factors=factors, recent_window=recent_window, sinks=sinks, generated=generated)
    past = compare(model, mask, {"max_length": 60} if static else None, **more)
    seen = 44 if generated == "prune" else more.get("prefill_chunk_size", 21)
    young = seen <= recent_window + sinks and not (static and generated == "prune")
    assert past.layers[0].key_side.codec.name == ("whole" if young else "cskv")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys rebuilt a few at a time, and values absorbed, equal those rebuilt at full width."""
    monkeypatch.setattr(side, "REBUILT", 7)
    model = tiny_model(family)
    width = model.config.num_attention_heads if family in ("OPT", "GPTNeoX") else model.config.num_key_value_heads
    past = compare(model, joint(model, 16 * width - 9, factors=True, recent_window=4, sinks=2))
    assert past.layers[0].key_side.buffer.tokens.shape[1] == 1
    assert "one KV head" in str(choose.reasons(past.layers[0])["cpu"])


@pytest.mark.parametrize("kinds", [("key",), ("value",)])
@STATIC
def test_one_side_alone(kinds: tuple[str, ...], static: bool) -> None:
    model = tiny_model("Llama")
    compare(model, joint(model, 11, kinds=kinds, recent_window=5, sinks=1), {"max_length": 60} if static else None)


def test_the_whole_rank_changes_nothing() -> None:
    model = tiny_model("Llama")
    past = grace_opt.runtime.cache(joint(model, 32, recent_window=2, sinks=1), model)
    assert_same(run(model, past), run(model, None))


def test_keys_are_never_held_at_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    monkeypatch.setattr(side, "REBUILT", 8)
    seen: list[int] = []
    rebuilt = side.Coding.rebuilt
    monkeypatch.setattr(side.Coding, "rebuilt", lambda self, *of: (seen.append(of[0].shape[2]), rebuilt(self, *of))[1])
    past = grace_opt.runtime.cache(joint(model, 9, recent_window=4, sinks=2), model)
    with torch.no_grad():
        model(input_ids=prompts()[0], past_key_values=past)
        seen.clear()
        for _ in range(20):
            model(input_ids=prompts()[0][:, :1], past_key_values=past)
    assert max(seen) == 8
    assert all(tensor.shape[-1] < 16 or tensor.shape[2] < 16 for tensor in past.layers[0].key_side.buffer.tensors())


@STATIC
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integers_of_codes(bits: int, static: bool) -> None:
    """Codes come back from the cache as `Codec.stored` says, and attention is over keys rebuilt of those."""
    model = tiny_model("Llama", max_position_embeddings=512, initializer_range=0.1)
    mask = joint(model, 20, recent_window=6, sinks=2)
    ids = torch.randint(3, 99, (2, 200), generator=torch.Generator().manual_seed(3))
    last = []
    for options in ({}, {"key_bits": bits, "value_bits": bits}):
        past = grace_opt.runtime.cache(mask, model, **options, **({"max_length": 210} if static else {}))
        with torch.no_grad():
            model(input_ids=ids[:, :150], past_key_values=past)
            last.append([model(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(150, 200)])
    exact, rounded = map(torch.cat, last)
    assert (rounded - exact).abs().max() < {8: 0.03, 4: 0.5, 3: 1.0, 2: 2.0}[bits]
    codec = past.layers[0].key_side.codec
    assert (codec.name, codec.bits, codec.heads) == ("integers", bits, 2)


@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
def test_cropped_tokens_might_never_have_come(generated: str, static: bool) -> None:
    model = tiny_model("Llama")
    mask = joint(model, 9, recent_window=6, sinks=2, generated=generated)
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


@pytest.mark.parametrize("bits", [{}, {"key_bits": 4, "value_bits": 4}])
@pytest.mark.parametrize("family", ["Llama", "Cohere"])
def test_a_compiled_step_is_one_graph_and_gives_the_same(family: str, bits: dict[str, int]) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 99, (2, 45), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    found = []
    for step in (model, compiled):
        past = grace_opt.runtime.cache(joint(model, 13, recent_window=4, sinks=2), model, max_length=80, **bits)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            steps = [step(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(12)]
        found.append(torch.stack(steps))
    assert_logits(found[1], found[0])


def test_a_cache_on_the_cpu_between_uses_gives_the_same() -> None:
    model = tiny_model("Llama")
    mask = joint(model, 13, factors=True, recent_window=4, sinks=2)
    ways = [grace_opt.runtime.cache(mask, model, offload=offload) for offload in (False, True)]
    one, other = (run(model, past) for past in ways)
    assert torch.equal(one.sequences, other.sequences)


def test_a_second_turn_sees_the_first_as_it_is_stored() -> None:
    """Of a layer: the keys that the second turn meets are those that one token after the other would."""
    model = tiny_model("Llama")
    mask = joint(model, 9, recent_window=4, sinks=2)
    ids, attended = prompts()
    ways = []
    for chunks in ([21, 6, 1, 9], [21, 6, 10]):
        past = grace_opt.runtime.cache(mask, model)
        more = torch.cat([ids, ids[:, :16]], dim=1)
        seen = torch.cat([attended, torch.ones_like(ids[:, :16])], dim=1)
        positions, low = (seen.cumsum(-1) - 1).clamp(min=0), 0
        with torch.no_grad():
            for size in chunks:
                part = slice(low, low + size)
                low += size
                model(
                    input_ids=more[:, part],
                    attention_mask=seen[:, :low],
                    position_ids=positions[:, part],
                    past_key_values=past,
                )
        ways.append(past.layers[0].key_side.buffer.tokens[:, :, :28])
    torch.testing.assert_close(ways[0], ways[1])


def test_a_code_does_not_depend_on_how_its_token_came() -> None:
    model = tiny_model("Llama")
    mask = joint(model, 9, recent_window=4, sinks=2)
    ids, _ = prompts()
    held = []
    for chunks in ([21], [8, 13], [10, *[1] * 11]):
        past, low = grace_opt.runtime.cache(mask, model), 0
        with torch.no_grad():
            for size in chunks:
                model(input_ids=ids[:, low : low + size], past_key_values=past)
                low += size
        # Of the first layer: what the others are given depends on what was compressed when it was read.
        held.append([each.buffer.tokens for each in past.layers[0].sides])
    for other in held[1:]:
        for one, two in zip(held[0], other, strict=True):
            torch.testing.assert_close(two, one)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_a_prompt_is_projected_onto_its_own_best_space(family: str) -> None:
    """Each row of a batch gives what it gives alone, and what is lost is the tail of the Gram matrix's eigenvalues."""
    from grace_opt.models.rotary import Turn, rotary_of

    model = tiny_model(family)
    policy = method("cskv", {"recent_window": 3, "sinks": 1})
    ids, attended = prompts()

    def fresh() -> Any:
        return grace_opt.runtime.online_cache(model, policy, ratio=0.5, value_ratio=0.75)

    past = fresh()
    together = run(model, past)
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1, attended[row].bool()],
            past_key_values=fresh(),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(alone[0, -24:], together.sequences[row, -24:])
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=attended, position_ids=positions, past_key_values=plain)
    for row in range(3):
        begin = int((1 - attended[row]).sum())
        keys, values = (each[row, :, begin:] for each in (plain.layers[0].keys, plain.layers[0].values))
        turned_back = Turn(rotary_of(model), 0).back(keys)
        for states, held in zip((turned_back, values), past.layers[0].sides, strict=True):
            old = states[:, 1:-3].movedim(0, 1).flatten(1)
            basis = held.codec.basis[row, 0]
            lost = (old - old @ basis.mT @ basis).square().sum()
            torch.testing.assert_close(
                lost, torch.linalg.svdvals(old)[len(basis) :].square().sum(), rtol=1e-3, atol=1e-4
            )


def published(model: Any, hidden: torch.Tensor, kind: str, rank: int) -> torch.Tensor:
    """Keys before RoPE, or values, [T, H n] as ASVD's two factors make them of the first layer's inputs [T, D]:
    scales of the mean magnitudes' roots, the SVD of the scaled projection, its singular values shared by both."""
    layer = getattr(model.model.layers[0].self_attn, f"{kind[0]}_proj")
    scales = (hidden.abs().mean(0) + 1e-6).sqrt()
    u, s, v = torch.linalg.svd(scales[:, None] * layer.weight.T, full_matrices=False)
    down, up = u[:, :rank] / scales[:, None] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    return hidden @ down @ up + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_asvd_is_what_its_factors_make_of_the_inputs(family: str) -> None:
    model = tiny_model(family)
    ids = prompts()[0][1:2]
    if family == "Qwen2":  # its biases begin as zeros
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.data.normal_(generator=torch.Generator().manual_seed(5))
    past = grace_opt.runtime.online_cache(
        model, method("asvd", {"recent_window": 2, "sinks": 1}), ratio=0.5, value_ratio=0.25
    )
    inputs: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _, given, named: inputs.append(named["hidden_states"][0]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
    hook.remove()
    for kind, rank, held in (("key", 16, past.layers[0].key_side), ("value", 24, past.layers[0].value_side)):
        read = held.codec.read(held.buffer.tokens, None)[0].movedim(0, 1).flatten(1)
        torch.testing.assert_close(read, published(model, inputs[0], kind, rank), atol=1e-4, rtol=1e-4)
    past.release()
    assert not attention._forward_pre_hooks
    normed = tiny_model("Qwen3")
    with pytest.raises(InputError, match="not a plain linear layer of its input, which ASVD splits; use cskv"):
        run(normed, grace_opt.runtime.online_cache(normed, "asvd", ratio=0.5))


@pytest.mark.parametrize("name", ["asvd", "cskv-attention"])
def test_a_row_of_a_batch_is_fitted_as_it_is_alone(name: str) -> None:
    model = tiny_model("Llama")
    policy = method(name, {"recent_window": 3, "sinks": 1})
    ids, attended = prompts()

    def fresh() -> Any:
        return grace_opt.runtime.online_cache(model, policy, ratio=0.25, value_ratio=0.5)

    together = run(model, fresh())
    for row in range(3):
        alone = model.generate(
            ids[row : row + 1, attended[row].bool()],
            past_key_values=fresh(),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(alone[0, -24:], together.sequences[row, -24:])


def test_a_shared_budget_goes_where_eigenvalues_are_largest() -> None:
    from grace_opt.compression.apply import apply
    from grace_opt.compression.budget import Budget
    from tests.support.observed import observed_layers

    layers = observed_layers(4)
    plan = apply(method("cskv", {"budget": "shared", "floor": 1}), layers, Budget(0.5, 0.25))
    for kind, share in (("key", 0.5), ("value", 0.75)):
        ranks = [plan.layers[i].codecs[kind][0].width for i in layers]  # type: ignore[index]
        saved = [Cskv.spectrum(seen, kind) for seen in layers.values()]  # type: ignore[arg-type]
        assert sum(ranks) == share * sum(map(len, saved))
        worst = min(float(each[rank - 1]) for each, rank in zip(saved, ranks, strict=True))
        best = max(float(each[rank]) for each, rank in zip(saved, ranks, strict=True) if rank < len(each))
        assert worst >= best
        assert kind == "value" or len(set(ranks)) > 1


@pytest.mark.parametrize("bits", [None, 4])
def test_bytes_are_those_of_the_formula(bits: int | None) -> None:
    """Section 2.8's: codes of old tokens, whole ones in between; and to the byte, what `held_bytes` says."""
    from grace_opt.compression.pays import held_bytes

    model = tiny_model("Llama", max_position_embeddings=8192, num_hidden_layers=1).half()
    mask = joint(model, 8, recent_window=32, sinks=4)
    more = {} if bits is None else {"key_bits": bits, "value_bits": bits}
    past = grace_opt.runtime.cache(mask, model, **more)
    tokens, whole, item = 6000, 32 + 32 + 4, 2
    with torch.no_grad():
        model.base_model(input_ids=torch.full((1, tokens), 7), past_key_values=past)
    layer = past.layers[0]
    expected = held_bytes(past.plan.layers[0], {"key": (2, 16), "value": (2, 16)}, tokens, item)
    assert past.nbytes == expected
    constants = 2 * 8 * 32 * item  # A and B of both sides are one matrix each
    codes = (8 + 8) * item if bits is None else (8 + 8) * bits / 8 + 8 * 4 / 32 + 4
    formula = (tokens - whole) * codes + whole * 2 * 32 * item
    assert past.nbytes - constants == pytest.approx(formula, rel=0.015 if bits is None else 0.04)
    assert layer.shapes == {"key": (2, 16), "value": (2, 16)}


def test_what_it_cannot_do_is_said() -> None:
    model = tiny_model("Llama")
    with pytest.raises(InputError, match="from 1 to the 32 channels of all 2 KV heads"):
        Cskv(torch.zeros(0, 32), 2)
    wrong = joint(tiny_model("Llama", num_key_value_heads=4), 9, recent_window=4, sinks=2).plan
    with pytest.raises(InputError, match="the mask has 4 KV heads"), torch.no_grad():
        model(input_ids=prompts()[0], past_key_values=grace_opt.runtime.cache(wrong, model))
    policy = method("cskv", {"tokens": "streaming", "token_share": 0.5, "recent_window": 3, "sinks": 1})
    past = grace_opt.runtime.online_cache(model, policy, ratio=0.5, value_ratio=0.5)
    with pytest.raises(InputError, match="a token policy moves tokens together"):
        run(model, past)
    dynamic = tiny_model("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(InputError, match="changes with the length of the text"):
        grace_opt.runtime.online_cache(dynamic, "cskv", ratio=0.5)
