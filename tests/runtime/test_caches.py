"""Value channels, preallocated and compiled caches, cropping, integers, offloading, and selection from each prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

import grace_opt.runtime
from grace_opt import InputError
from tests.support.families import tiny_model
from tests.support.generation import assert_same, compare, logits_of, prompts, random_mask, run
from tests.support.reference import use_zero_channel_attention
from tests.support.slack import assert_logits

WAYS = pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
STATIC = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


@WAYS
@STATIC
@pytest.mark.parametrize(("readout", "generated"), [("none", "prune"), ("static", "prune"), ("static", "keep")])
@pytest.mark.parametrize(("kept", "values"), [(None, 6), (7, 5)])
@pytest.mark.parametrize(("recent_window", "sinks"), [(0, 3), (1, 0), (6, 4), (500, 2)])
def test_values_too(
    recent_window: int,
    sinks: int,
    kept: int | None,
    values: int,
    readout: str,
    generated: str,
    static: bool,
    more: dict[str, int],
) -> None:
    model = tiny_model("Llama")
    windows: dict[str, Any] = {"recent_window": recent_window, "sinks": sinks, "generated": generated}
    mask = random_mask(model, kept, values=values, readout=readout, **windows)
    compare(model, mask, {"max_length": 60} if static else None, **more)


@STATIC
@pytest.mark.parametrize("readout", ["none", "static"])
def test_heads_of_different_key_and_value_widths(readout: str, static: bool) -> None:
    model = tiny_model("GPTNeoX")
    mask = random_mask(model, 6, values=9, recent_window=3, sinks=2, readout=readout, ragged=True)
    compare(model, mask, {"max_length": 50} if static else None, num_beams=2)


@STATIC
@pytest.mark.parametrize("family", ["Gemma3Text", "SmolLM3", "Mixtral"])
def test_families_with_pruned_values(family: str, static: bool) -> None:
    model = tiny_model(family)
    mask = random_mask(model, 7, values=7, recent_window=4, sinks=2, readout="static")
    compare(model, mask, {"max_length": 64} if static else None)


@STATIC
def test_two_chat_turns(static: bool) -> None:
    model = tiny_model("Qwen2")
    mask = random_mask(model, 7, values=8, recent_window=5, sinks=2, readout="static")
    ids, attended = prompts()
    ids, attended = torch.cat([ids] * 3, 1), torch.cat([attended, torch.ones(3, 42, dtype=torch.long)], 1)
    turns = [21, *[1] * 9, 12, *[1] * 9]
    past = grace_opt.runtime.cache(mask, model, max_length=63 if static else None)
    ours = logits_of(model, past, turns, ids, attended)
    use_zero_channel_attention(model, mask)
    for mine, theirs in zip(
        ours, logits_of(model, DynamicCache(config=model.config), turns, ids, attended), strict=True
    ):
        assert_logits(mine, theirs)


@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("recent_window", "crops"), [(6, [3, 6, 1]), (0, [9, 4, 20]), (40, [7, 25, 3])])
def test_cropped_tokens_might_never_have_come(
    recent_window: int, crops: list[int], ragged: bool, generated: str, static: bool
) -> None:
    model = tiny_model("Llama")
    windows: dict[str, Any] = {"recent_window": recent_window, "sinks": 2, "generated": generated}
    mask = random_mask(model, 7, values=8, readout="static", ragged=ragged, **windows)
    ids, attended = prompts()
    ids, attended = torch.cat([ids] * 4, 1), torch.cat([attended, torch.ones(3, 63, dtype=torch.long)], 1)
    reference = DynamicCache(config=model.config)
    past = grace_opt.runtime.cache(mask, model, max_length=84 if static else None)
    lengths: dict[int, int] = {}
    steps = [(21, None), *((size, crop) for crop in crops for size in (8, 1, 1, 1, 1, 1, crop))]
    for size, crop in steps:
        model.set_attn_implementation("grace_opt")
        (ours,) = logits_of(model, past, [size], ids, attended)
        use_zero_channel_attention(model, mask, lengths)
        (theirs,) = logits_of(model, reference, [size], ids, attended)
        assert_logits(ours, theirs)
        if crop is not None and size == crop:
            past.crop(-crop)
            reference.crop(-crop)
            assert int(past.get_seq_length()) == reference.get_seq_length()


@STATIC
@pytest.mark.parametrize("generated", ["prune", "keep"])
def test_a_prompt_that_is_cropped_might_have_been_shorter(generated: str, static: bool) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 7, values=8, recent_window=6, sinks=2, readout="static", generated=generated)
    ids, attended = prompts()
    ids, attended = torch.cat([ids] * 2, 1), torch.cat([attended, torch.ones(3, 21, dtype=torch.long)], 1)
    options = {"max_length": 42} if static else {}
    expected = logits_of(model, grace_opt.runtime.cache(mask, model, **options), [16, *[1] * 9], ids, attended)
    past = grace_opt.runtime.cache(mask, model, **options)
    logits_of(model, past, [21], ids, attended)
    past.crop(-5)
    ours = logits_of(model, past, [1] * 9, ids, attended)
    for mine, theirs in zip(ours, expected[1:], strict=True):
        assert_logits(mine, theirs)


@STATIC
def test_a_crop_past_the_window_is_refused_and_changes_nothing(static: bool) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 7, recent_window=6, sinks=2)
    ids, attended = prompts()
    past = grace_opt.runtime.cache(mask, model, max_length=40 if static else None)
    logits_of(model, past, [19], ids, attended)
    before = [tensor.clone() for layer in past.layers for tensor in layer.tensors()]
    with pytest.raises(InputError, match="the last 7 tokens cannot be taken back, only 6"):
        past.crop(-7)
    past.crop(0)
    for old, new in zip(before, (tensor for layer in past.layers for tensor in layer.tensors()), strict=True):
        assert torch.equal(old, new)
    past.crop(13)  # all but 13: transformers before 5.10
    with pytest.raises(InputError, match="the last 1 tokens cannot be taken back, only 0"):
        past.crop(-1)
    logits_of(model, past, [1], ids, attended)
    past.crop(-1)
    assert int(past.get_seq_length()) == 13


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_speculative_decoding_gives_the_same_tokens(how: str) -> None:
    model, assistant = tiny_model("Llama"), tiny_model("Llama", seed=1)
    # An assistant that is often right: the model itself, disturbed.
    for ours, theirs in zip(assistant.parameters(), model.parameters(), strict=True):
        ours.data.copy_(theirs.data + 0.002 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0)))
    mask = random_mask(model, 9, values=9, recent_window=24, sinks=2, readout="static")
    ids = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(2))
    common = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    plain = model.generate(ids, past_key_values=grace_opt.runtime.cache(mask, model), **common)
    more = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 5}
    past = grace_opt.runtime.cache(mask, model)
    faster = model.generate(ids, past_key_values=past, **more, **common)
    assert torch.equal(plain, faster)
    assert past.get_seq_length() >= plain.shape[1] - 1 > 45


@WAYS
@pytest.mark.parametrize("readout", ["none", "static", "prefill"])
def test_offloading_changes_nothing(readout: str, more: dict[str, int]) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 7, values=8, recent_window=4, sinks=2, readout=readout, ragged=True)
    plain = run(model, grace_opt.runtime.cache(mask, model), **more)
    past = grace_opt.runtime.cache(mask, model, offload=True)
    assert_same(run(model, past, **more), plain)
    for index, layer in enumerate(past.layers):
        past.offload(index)
        assert all(tensor.device.type == "cpu" for tensor in layer.tensors())


def _compiled_logits(
    model: Any, past: Any, places: range, ids: torch.Tensor, attended: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    """Logits of one token after the other, by a compiled step; the counters of the compiler begin anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step, found = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=False), []
    with torch.no_grad():
        for at in places:
            positions = (attended.cumsum(-1) - 1)[:, at : at + 1]
            seen = attended.clone()
            seen[:, at + 1 :] = 0
            out = step(input_ids=ids[:, at : at + 1], attention_mask=seen, position_ids=positions, past_key_values=past)
            found.append(out.logits[:, 0])
    return found


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("readout", ["none", "static", "prefill"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_step_is_one_graph_and_gives_the_same(padded: bool, readout: str, backend: str) -> None:
    model = tiny_model("Llama", num_hidden_layers=1 if backend == "aot_eager" else 2)
    # Both ways to hold generated tokens, without trying everything twice.
    generated = "keep" if (readout == "static") == padded else "prune"
    mask = random_mask(model, 7, values=8, recent_window=4, sinks=2, readout=readout, generated=generated)
    ids, attended = prompts()
    if not padded:
        attended = torch.ones_like(attended)
    wide = torch.ones(3, 60, dtype=torch.long)
    wide[:, :21] = attended
    ids = torch.cat([ids] * 3, 1)
    eager = logits_of(model, grace_opt.runtime.cache(mask, model), [21, *[1] * 30], ids, wide)
    past = grace_opt.runtime.cache(mask, model, max_length=60)
    ours = logits_of(model, past, [21], ids, wide)
    ours += _compiled_logits(model, past, range(21, 51), ids, wide, backend)
    for mine, theirs in zip(ours, eager, strict=True):
        assert_logits(mine, theirs)
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 2  # the second: lengths that changed once are taken as tensors


@pytest.mark.slow
def test_generate_compiles_the_decoding_of_a_preallocated_cache() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 7, values=8, recent_window=4, sinks=2, readout="prefill")
    plain = run(model, grace_opt.runtime.cache(mask, model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True)  # by inductor
    config._compile_all_devices = True
    past = grace_opt.runtime.cache(mask, model, max_length=48)
    assert_same(run(model, past, compile_config=config, disable_compile=False), plain)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kinds", [("key",), ("value",), ("key", "value")])
def test_integers_hold_old_tokens_and_nothing_else(kinds: tuple[str, ...], bits: int) -> None:
    from grace_opt.compression.integers import quantise
    from grace_opt.runtime.packed import Packed

    model = tiny_model("Llama", max_position_embeddings=512)
    mask = random_mask(model, 7, values=8, recent_window=6, sinks=2)
    ids = torch.randint(3, 99, (2, 301), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, :45] = 0
    past = grace_opt.runtime.cache(mask, model, **{f"{kind}_bits": bits for kind in kinds})
    plain = grace_opt.runtime.cache(mask, model)
    for cache in (past, plain):
        logits_of(model, cache, [150, *[1] * 40, 60, *[1] * 51], ids, attended)
    # Both caches saw the same keys in the first layer, so what is stored there differs by the rounding alone.
    for kind, held, whole in zip(("key", "value"), past.layers[0].sides, plain.layers[0].sides, strict=True):
        columns, (exact,) = torch.cat(list(held.buffer.parts()), 2), whole.buffer.parts()
        places = held.buffer.places()
        torch.testing.assert_close(held.window.rows, whole.window.rows)
        if kind not in kinds:
            torch.testing.assert_close(columns, exact)
            continue
        assert isinstance(held.buffer, Packed)
        assert places is not None
        for row, padding in enumerate((45, 0)):  # behind a row's own sinks, before the window and what crop needs
            begin = padding + 2
            packed = 32 * ((301 - begin - 2 * 6) // 32)
            if padding == 0:
                assert held.buffer.packed_tokens == packed
            old = exact[row, :, begin : begin + packed].unflatten(1, (-1, 32))
            back = quantise(old, bits, "channel" if kind == "key" else "token").unpack().flatten(1, 2)  # type: ignore[arg-type]
            stored = columns[row][:, places.column[row, padding:]]
            around = exact[row, :, padding:begin], back, exact[row, :, begin + packed :]
            torch.testing.assert_close(stored, torch.cat(around, 1))
            assert int(places.filled[row].sum()) == 301 - padding
    assert past.nbytes < plain.nbytes


def test_eight_bits_are_nearly_the_same() -> None:
    model = tiny_model("Llama", max_position_embeddings=512, initializer_range=0.1)
    mask = random_mask(model, 9, values=9, recent_window=6, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 200), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    pasts = [grace_opt.runtime.cache(mask, model, **bits) for bits in ({}, {"key_bits": 8, "value_bits": 8})]
    exact, rounded = (logits_of(model, past, [150, *[1] * 50], ids, attended) for past in pasts)
    torch.testing.assert_close(torch.cat(rounded[1:]), torch.cat(exact[1:]), atol=0.03, rtol=0)
    assert (torch.cat(rounded[1:]) - torch.cat(exact[1:])).abs().max() > 0


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"prefill_chunk_size": 50}], ids=["beams", "chunks"])
def test_integers_follow_beams_and_chunks(more: dict[str, int]) -> None:
    model = tiny_model("Llama", initializer_range=0.1, max_position_embeddings=512)
    mask = random_mask(model, 9, values=9, recent_window=6, sinks=2, readout="prefill")
    ids = torch.randint(3, 99, (2, 120), generator=torch.Generator().manual_seed(3))
    common = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    exact, rounded = (
        model.generate(ids, past_key_values=grace_opt.runtime.cache(mask, model, **bits), **common)
        for bits in ({}, {"key_bits": 8, "value_bits": 8})
    )
    assert (exact == rounded).float().mean() > 0.9


@pytest.mark.parametrize("bits", [{"key_bits": 4, "value_bits": 2}, {"key_bits": 3}, {"value_bits": 8}], ids=str)
@pytest.mark.parametrize(("generated", "sinks"), [("prune", 2), ("prune", 0), ("keep", 3)])
def test_preallocated_integers_are_those_of_a_growing_cache(bits: dict[str, int], generated: str, sinks: int) -> None:
    """Rows that begin anywhere, one of them only after the prompt's first chunk; long chunks, and blocks due while
    tokens come one by one; a beam that becomes another; a copy."""
    model = tiny_model("Llama", num_hidden_layers=1, max_position_embeddings=512)
    mask = random_mask(model, 7, values=9, recent_window=6, sinks=sinks, readout="static", generated=generated)
    ids = torch.randint(3, 99, (4, 330), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    for row, padding in enumerate((45, 0, 7, 110)):
        attended[row, :padding] = 0
    found = []
    for room in ({}, {"max_length": 330}):
        past = grace_opt.runtime.cache(mask, model, kernel="plain", **bits, **room)
        logits = logits_of(model, past, [100, 30, *[1] * 70, 90, 1, 1], ids, attended)
        past.reorder_cache(torch.tensor([1, 1, 0, 3]))
        other = copy.deepcopy(past)
        for each in (past, other):
            logits += logits_of(model, each, [*[1] * 3, 20], ids, attended[[1, 1, 0, 3]])
        found.append(logits)
    for ours, theirs in zip(*found, strict=True):
        assert_logits(ours, theirs)


@pytest.mark.parametrize("generated", ["prune", "keep"])
def test_a_compiled_step_packs_integers_in_one_graph(generated: str) -> None:
    model = tiny_model("Llama", num_hidden_layers=1, max_position_embeddings=512)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static", generated=generated)
    ids = torch.randint(3, 99, (2, 150), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, :13] = 0
    eager = logits_of(
        model, grace_opt.runtime.cache(mask, model, key_bits=4, value_bits=4), [70, *[1] * 60], ids, attended
    )
    past = grace_opt.runtime.cache(mask, model, key_bits=4, value_bits=4, max_length=150)
    ours = logits_of(model, past, [70], ids, attended)
    ours += _compiled_logits(model, past, range(70, 130), ids, attended, "aot_eager")
    for mine, theirs in zip(ours, eager, strict=True):
        assert_logits(mine, theirs)
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 2


@STATIC
def test_integers_can_be_cropped_within_the_window(static: bool) -> None:
    model = tiny_model("Llama", max_position_embeddings=512)
    mask = random_mask(model, 7, values=8, recent_window=6, sinks=2)
    ids = torch.randint(3, 99, (1, 200))
    attended = torch.ones_like(ids)
    room = {"max_length": 200} if static else {}
    once, again = (grace_opt.runtime.cache(mask, model, key_bits=4, value_bits=4, **room) for _ in range(2))
    expected = logits_of(model, once, [100, *[1] * 8, 4], ids, attended)
    logits_of(model, again, [100, *[1] * 14], ids, attended)
    again.crop(-6)
    torch.testing.assert_close(logits_of(model, again, [4], ids, attended)[0], expected[-1])
    with pytest.raises(InputError, match="cannot be taken back"):
        again.crop(-90)


@STATIC
@pytest.mark.parametrize("method", ["grace-opt", "grace", "think"])
def test_a_prompt_chooses_what_the_method_chooses(method: str, static: bool) -> None:
    from grace_opt.compression.apply import apply
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.method import method as named
    from grace_opt.compression.readout import fit, moments
    from grace_opt.graphs.observed import Observed, output_projection

    model = tiny_model("Llama")
    options = {"budget": "uniform", "recent_window": 4, "sinks": 2, "observation_window": 8}
    policy = named(method, options)
    ids, attended = prompts()
    past = grace_opt.runtime.online_cache(model, policy, ratio=0.5, value_ratio=0.3, max_length=60 if static else None)
    logits_of(model, past, [21], ids, attended)
    seen: dict[int, Any] = {}

    def see(module: Any, query: Any, key: Any, value: Any, scaling: float, arguments: Any) -> None:
        seen[module.layer_idx] = (query, key, value, scaling, output_projection(module, query.shape[1], value))

    from grace_opt.models.attention import attending_with, observing

    with torch.no_grad(), attending_with(model, observing(see)):
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=attended, position_ids=positions, use_cache=False)
    for row in range(3):
        first = 21 - int(attended[row].sum())
        layers = {
            i: Observed(
                q[row, :, max(first, 13) :], k[row, :, first:], v[row, :, first:], s, 2, 4, o, policy.selection.spans
            )
            for i, (q, k, v, s, o) in seen.items()
        }
        plans = apply(policy, layers, Budget(0.5, 0.3)).layers
        for i, layer in enumerate(past.layers):
            for kind, side in zip(("key", "value"), layer.sides, strict=True):
                for head, each in enumerate(plans[i].codecs[kind]):
                    codec = side.codec.mapped(lambda tensor, row=row, head=head: tensor[row, head])
                    assert torch.equal(codec.keep, each.keep)
                    if policy.readout.readout_fit != "none":
                        seen_here = layers[i]
                        tokens = (seen_here.keys if kind == "key" else seen_here.values)[:, seen_here.prunable]
                        about = moments(tokens, seen_here.token_weights, policy.readout.mixed(kind))[head]
                        readout = fit(about, each.keep.numpy())
                        torch.testing.assert_close(codec.matrix, torch.from_numpy(readout.matrix).float())
                        torch.testing.assert_close(codec.constant, torch.from_numpy(readout.constant).float())


def test_a_prompt_too_short_to_prune_still_runs() -> None:
    model = tiny_model("Llama")
    plain = run(model, None, new_tokens=5)
    past = grace_opt.runtime.online_cache(model, ratio=0.5, value_ratio=0.5)
    assert_same(run(model, past, new_tokens=5), plain)  # all of it fits into the recent window
    one = model.generate(
        torch.tensor([[5]]),
        past_key_values=grace_opt.runtime.online_cache(model, ratio=0.5),
        max_new_tokens=80,
        eos_token_id=None,
    )
    assert one.shape == (1, 81)


@STATIC
@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_steps_hold_what_must_be_kept(steps: int, static: bool) -> None:
    model = tiny_model("Llama", max_position_embeddings=12_000, num_hidden_layers=1)
    mask = random_mask(model, 6, values=9, recent_window=32, sinks=4, readout="prefill")
    past = grace_opt.runtime.cache(mask, model, max_length=steps + 64 if static else None)
    ids = torch.randint(3, 99, (1, 64), generator=torch.Generator().manual_seed(5))
    (layer,) = past.layers
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=past)
        start = past.nbytes
        step = model.forward
        if static:
            torch._dynamo.reset()
            step = torch.compile(model.forward, fullgraph=True, backend="eager")
        live = 0
        for at in range(steps):
            if static and at == 3:
                torch._dynamo.utils.counters.clear()
            step(input_ids=ids[:, at % 64][None], past_key_values=past)
            if at == steps // 2:
                live = _live_bytes() - past.nbytes
    assert int(past.get_seq_length()) == steps + 64
    assert _live_bytes() - past.nbytes == live  # nothing grows but the cache
    if static:
        assert past.nbytes == start
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0  # no compilation after the first
        return
    kept = 2 * 4 * (6 + 9)  # KV heads, bytes, channels
    fixed = past.nbytes - sum(side.buffer.buffer.nbytes for side in layer.sides)
    assert fixed == start - 64 * kept  # rows of the window and the sinks, read-outs
    assert (steps + 64) * kept <= past.nbytes - fixed <= (steps + 64) * kept * 1.008


def _live_bytes() -> int:
    import gc

    while gc.collect():  # what the end of another test's cache sets free is found by the next pass only
        pass
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_full_preallocated_cache_says_so(compiled: bool) -> None:
    model = tiny_model("Llama")
    past = grace_opt.runtime.cache(random_mask(model, 6, recent_window=3, sinks=1), model, max_length=23)
    ids, _ = prompts()
    step = torch.compile(model.forward, fullgraph=True, backend="eager") if compiled else model.forward
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
        for _ in range(2):
            step(input_ids=ids[:, :1], past_key_values=past)
        with pytest.raises(RuntimeError if compiled else InputError, match="larger max_length"):
            step(input_ids=ids[:, :1], past_key_values=past)
    with pytest.raises(InputError, match="holds 23 tokens and was given 24"), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=past)


@STATIC
def test_what_does_not_fit_the_cache_is_a_sentence(static: bool) -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, values=6, recent_window=3, sinks=1)
    options: dict[str, Any] = {"max_length": 60} if static else {}
    ids, attended = prompts()
    past = grace_opt.runtime.cache(mask, model, **options)
    right = attended.flip(1)
    with torch.no_grad():
        with pytest.raises(InputError, match="padded on the right; pad prompts on the left"):
            model(input_ids=ids, attention_mask=right, past_key_values=past)
        with pytest.raises(InputError, match="tokens whose attention was never computed .* start a new cache"):
            model(input_ids=ids, attention_mask=attended, past_key_values=past)
        past.reset()
        model(input_ids=ids, past_key_values=past)
        with pytest.raises(InputError, match="holds 3 rows and was given 2"):
            model(input_ids=ids[:2, :1], past_key_values=past)
        with pytest.raises(InputError, match=r"holds torch.float32 on cpu and was given torch.bfloat16 on cpu"):
            tiny_model("Llama").to(torch.bfloat16)(input_ids=ids[:, :1], past_key_values=past)
        with pytest.raises(InputError, match="padded on the right"):
            model(input_ids=ids[:, :4], attention_mask=_last_unseen(attended, 25), past_key_values=past)
    other = tiny_model("Llama", num_key_value_heads=4)
    with pytest.raises(InputError, match="has 2 KV heads of 16 key channels in layer 0, the model has 4 of 16"):
        run(other, grace_opt.runtime.cache(mask, other, **options))


def _last_unseen(attended: torch.Tensor, length: int) -> torch.Tensor:
    longer = torch.ones(len(attended), length, dtype=torch.long)
    longer[:, : attended.shape[1]] = attended
    longer[1, -1] = 0
    return longer


def test_options_that_cannot_be_are_refused() -> None:
    model = tiny_model("Llama")
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    for options, message in (
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"key_bits": 5}, "2, 3, 4 or 8 bits, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            grace_opt.runtime.cache(mask, model, **options)
    for method, more, message in (
        ("grace_opt", {"ratio": 0.5}, "unknown method 'grace_opt'; did you mean"),
        ("think", {"ratio": 1.0}, "the ratio must be at least 0 and below 1"),
    ):
        with pytest.raises(InputError, match=message):
            grace_opt.runtime.online_cache(model, method, **more)


def test_protection_that_leaves_too_little_is_said() -> None:
    model = tiny_model("Llama")
    ids = torch.randint(3, 99, (1, 60))
    from grace_opt.compression.method import method
    from grace_opt.graphs.protection import Protection

    strict = method("grace", {"protection": Protection(at_least=0.3, at_most=0.3)})
    with pytest.raises(InputError, match="protection leaves 12; prune fewer"), torch.no_grad():
        model(input_ids=ids, past_key_values=grace_opt.runtime.online_cache(model, strict, ratio=0.8))


def test_read_outs_of_the_runtime_are_those_of_masks() -> None:
    from grace_opt.compression.readout import fit, moments, weighted_moments
    from grace_opt.compression.readout import fit_many as batched

    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 50, 12, generator=rng) @ torch.randn(12, 12, generator=rng)
    tokens[2, :, :5] = 1.0  # kept channels that do not vary
    weights = torch.rand(3, 50, generator=rng).softmax(-1)
    for width in (0, 5, 12):
        matrix, constant = batched(*weighted_moments(tokens, weights, 0.05), width, 1e-3)
        for head, about in enumerate(moments(tokens, weights, 0.05)):
            each = fit(about, torch.arange(width).numpy())
            torch.testing.assert_close(matrix[head], torch.from_numpy(each.matrix))
            torch.testing.assert_close(constant[head], torch.from_numpy(each.constant))


class Waits(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        self.count += name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"))
        return function(*args, **(kwargs or {}))


def test_a_decoded_token_waits_for_nothing() -> None:
    from grace_opt.runtime.attention import attention

    model = tiny_model("Llama")
    module = model.model.layers[0].self_attn
    mask = random_mask(model, 7, values=8, recent_window=4, sinks=2, readout="prefill", ragged=True)
    masked = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    masked[0, ..., :5] = False
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    pasts = [grace_opt.runtime.cache(mask, model), grace_opt.runtime.online_cache(model, ratio=0.5, value_ratio=0.5)]
    for past in pasts:
        layer, waits = past.layers[0], Waits()

        def step(new: int, seen: torch.Tensor, layer: Any = layer) -> None:
            keys, values = layer.update(torch.randn(2, 2, new, 16), torch.randn(2, 2, new, 16))
            attention(module, torch.randn(2, 4, new, 16), keys, values, seen)

        with torch.inference_mode(), waits:
            step(100, masked[..., :100] & causal)
            prompt, waits.count = waits.count, 0
            for length in range(101, 140):
                step(1, masked[..., :length])
        assert prompt < 20  # where the rows begin, of each group of heads; not by token, nor by step of the selection
        assert waits.count == 0


@STATIC
def test_a_copy_goes_its_own_way(static: bool) -> None:
    """A prompt that is prefilled once and continued twice, as transformers advises for shared prefixes."""
    model = tiny_model("Llama")
    mask = random_mask(model, 7, values=8, recent_window=4, sinks=2, readout="prefill")
    ids, attended = prompts()
    ids, attended = torch.cat([ids] * 2, 1), torch.cat([attended, torch.ones(3, 21, dtype=torch.long)], 1)
    past = grace_opt.runtime.cache(mask, model, max_length=42 if static else None)
    logits_of(model, past, [20], ids, attended)
    copied = copy.deepcopy(past)
    logits_of(model, copied, [7, 1], ids.flip(1), attended)
    fresh = grace_opt.runtime.cache(mask, model, max_length=42 if static else None)
    expected = logits_of(model, fresh, [20, 7, 1], ids, attended)[1:]
    for mine, theirs in zip(logits_of(model, past, [7, 1], ids, attended), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
