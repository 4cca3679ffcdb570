"""The decode kernel, interpreted, against its definition in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grace_opt.runtime
from grace_opt import InputError
from grace_opt.compression.integers import Packed, quantise
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.tokens.base import Tier, TokenPolicy, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.graphs.observed import Observed
from grace_opt.runtime.kernels import choose, split
from grace_opt.runtime.kernels import triton as kernel
from grace_opt.runtime.kernels.triton import Tokens, decode
from tests.support.families import tiny_model
from tests.support.generation import assert_same, random_mask, run

# conftest.py sets TRITON_INTERPRET before anything imports Triton; TRITON_INTERPRET=0 runs these tests on a card.
DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
# The interpreter's numpy says when a mask of float32's minimum passes to -inf, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def by_definition(
    query: Tensor,
    query_rows: Tensor,
    keys: Tokens,
    values: Tokens,
    length: int | Tensor,
    sinks: int,
    first: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token by token, as `decode` documents it, in float64 on the CPU."""
    total = int(length)
    recent = keys.rows.shape[2] - sinks
    batch, heads = query.shape[:2]

    def stored(tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, H, T, d] and, with zeros where there is no row, [B, H, T, e]."""
        kept = tokens.kept
        if tokens.packed is not None:
            kept = torch.cat([tokens.packed.unpack().flatten(2, 3), kept], 2)
        rows = torch.zeros(batch, heads, total, tokens.rows.shape[3], dtype=torch.float64)
        for b in range(batch):
            for t in range(total):
                if t >= total - recent:
                    rows[b, :, t] = tokens.rows[b, :, sinks + t - (total - recent)].double()
                elif first is not None and 0 <= t - int(first[b]) < sinks:
                    rows[b, :, t] = tokens.rows[b, :, t - int(first[b])].double()
        return kept[:, :, :total].double().cpu(), rows

    (k, k_rows), (v, v_rows) = stored(keys), stored(values)
    scores = query.double().cpu() @ k.mT + query_rows.double().cpu() @ k_rows.mT
    if mask is not None:
        seen = mask[:, None, None, :total].cpu()
        scores = scores.masked_fill(~seen, -torch.inf) if mask.dtype == torch.bool else scores + seen.double()
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ v, weights @ v_rows


@dataclass(frozen=True)
class Case:
    """What to make random input of; see `Inputs`."""

    length: int
    dk: int = 16
    dv: int = 16
    ek: int = 8
    ev: int = 8
    group: int = 2
    sinks: int = 0
    recent: int = 0
    batch: int = 1
    heads: int = 2
    key_bits: int = 0
    value_bits: int = 0
    key_blocks: int = 0
    value_blocks: int = 0
    dtype: torch.dtype = torch.float32
    seed: int = 0


def make(case: Case) -> dict[str, Any]:
    """Random arguments of `decode`: no mask, and each row's sinks at 0."""
    torch.manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, case.heads, *shape).to(DEVICE, case.dtype)

    def tokens(width: int, residual: int, bits: int, blocks: int, axis: Any) -> Tokens:
        packed = quantise(normal(blocks, 32, width), bits, axis) if bits else None  # type: ignore[arg-type]
        kept = normal(case.length - (32 * blocks if bits else 0), width)
        return Tokens(kept, normal(case.sinks + case.recent, residual), packed)

    return {
        "query": normal(case.group, case.dk) / case.dk**0.5,
        "query_rows": normal(case.group, case.ek) / case.dk**0.5,
        "keys": tokens(case.dk, case.ek, case.key_bits, case.key_blocks, "channel"),
        "values": tokens(case.dv, case.ev, case.value_bits, case.value_blocks, "token"),
        "length": case.length,
        "sinks": case.sinks,
        "first": torch.zeros(case.batch, dtype=torch.int64, device=DEVICE) if case.sinks else None,
        "mask": None,
    }


def check(arguments: dict[str, Any], splits: int | None = 2, exact: dict[str, Any] | None = None) -> None:
    """decode(arguments) is what the definition gives for ``exact``, the same arguments if not given."""
    expected = by_definition(**(exact or arguments))
    query = arguments["query"]
    got = decode(**arguments, splits=splits)
    for ours, theirs, width in zip(got, expected, (arguments["values"].kept, arguments["values"].rows), strict=True):
        assert ours.dtype == query.dtype
        assert ours.shape == (*query.shape[:3], width.shape[3])
        torch.testing.assert_close(ours.double().cpu(), theirs, atol=TOLERANCE[query.dtype], rtol=0)


@pytest.mark.parametrize("length", [1, 5, 31, 33, 257, 1000])
@pytest.mark.parametrize("splits", [1, 2, 7, None])
def test_lengths_and_splits(length: int, splits: int | None) -> None:
    check(make(Case(length, sinks=2, recent=min(length, 40))), splits)


def test_more_splits_than_are_merged_at_a_time() -> None:
    """Later splits weigh more, so what was merged before them is rescaled."""
    check(make(Case(1200, recent=9)) | {"mask": torch.linspace(0, 5, 1200, device=DEVICE)[None]}, splits=19)


@pytest.mark.parametrize(
    ("dk", "dv", "ek", "ev"),
    [
        (8, 16, 24, 0),
        (16, 8, 0, 24),
        (24, 40, 0, 0),
        (40, 24, 24, 40),
        (64, 80, 64, 48),
        (80, 64, 5, 3),
        (96, 128, 32, 0),
    ],
)
@pytest.mark.parametrize("recent", [0, 3, 70])
def test_widths_and_windows(dk: int, dv: int, ek: int, ev: int, recent: int) -> None:
    check(make(Case(70, dk, dv, ek, ev, recent=recent, sinks=recent % 4)))


@pytest.mark.parametrize("group", range(1, 9))
def test_query_heads(group: int) -> None:
    check(make(Case(40, group=group, sinks=group % 6, recent=9, heads=3)), splits=None)


@pytest.mark.parametrize("sinks", range(6))
@pytest.mark.parametrize("recent", [0, 7, 100])
def test_left_padding(sinks: int, recent: int) -> None:
    """Rows of a batch begin at their own token; a window as long as the prompt reaches over sinks and padding."""
    arguments = make(Case(100, sinks=sinks, recent=recent, batch=3))
    first = torch.tensor([0, 29, 97], device=DEVICE)
    mask = torch.arange(100, device=DEVICE) >= first[:, None]
    check(arguments | {"first": first if sinks else None, "mask": mask})


def test_additive_mask() -> None:
    arguments = make(Case(90, sinks=2, recent=8, batch=2))
    mask = torch.randn(2, 95, device=DEVICE)
    mask[0, :13] = -torch.inf
    mask[1, 40:60] = torch.finfo(torch.float32).min
    for each in (mask, mask[1:], mask.bfloat16(), mask.t().contiguous().t()):
        check(arguments | {"mask": each})


@pytest.mark.parametrize("splits", [1, 3, 17])
def test_a_row_that_sees_nothing_is_zero(splits: int) -> None:
    """And one that sees a single token is that token, whatever the other splits hold."""
    arguments = make(Case(150, sinks=1, recent=8, batch=3))
    mask = torch.zeros(3, 150, dtype=torch.bool, device=DEVICE)
    mask[1, 77] = True
    check(arguments | {"mask": mask}, splits)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    kept, rows = decode(**arguments | {"mask": additive}, splits=splits)
    assert bool(kept.isfinite().all() and rows.isfinite().all())
    torch.testing.assert_close(kept[1], arguments["values"].kept[1, :, 77:78].expand_as(kept[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("key_blocks", "value_blocks"), [(3, 0), (0, 3), (1, 4), (4, 1), (3, 3), (5, 5)])
def test_packed(bits: int, key_blocks: int, value_blocks: int) -> None:
    """With a tail, and with none but for values (160 tokens are 5 blocks); widths that fill no last byte or group."""
    for length, dk, dv in ((160, 40, 41), (171, 16, 64)):
        case = Case(length, dk, dv, sinks=2, recent=50, key_blocks=key_blocks, value_blocks=value_blocks)
        # Values take other bits than keys.
        both = {"key_bits": bits if key_blocks else 0, "value_bits": (2 * bits) % 14 if value_blocks else 0}
        check(make(replace(case, **both)), splits=2)


def test_packed_blocks_may_lie_in_larger_buffers() -> None:
    def in_buffer(packed: Packed) -> Packed:
        parts = {}
        for name in ("codes", "scale", "zero"):
            tensor = getattr(packed, name)
            capacity = list(tensor.shape)
            capacity[2] += 3
            buffer = torch.full(capacity, 85).to(tensor)
            buffer[:, :, : tensor.shape[2]] = tensor
            parts[name] = buffer[:, :, : tensor.shape[2]]
        return replace(packed, **parts)

    arguments = make(
        Case(107, batch=2, key_bits=4, value_bits=2, key_blocks=3, value_blocks=2, dv=20, sinks=1, recent=9)
    )
    for kind in ("keys", "values"):
        arguments[kind] = replace(arguments[kind], packed=in_buffer(arguments[kind].packed))
    check(arguments)


def test_the_largest_float16_does_not_overflow() -> None:
    arguments = make(Case(32, value_bits=2, value_blocks=1, dtype=torch.float16, ek=0, ev=0))
    huge = torch.linspace(-65504, 65504, 32 * 16, device=DEVICE).half().view(1, 1, 1, 32, 16).expand(1, 2, 1, 32, 16)
    arguments["values"] = replace(arguments["values"], packed=quantise(huge, 2, "token"))
    assert bool(decode(**arguments)[0].isfinite().all())


@pytest.mark.parametrize("length", [1, 6, 33, 95])
@pytest.mark.parametrize("splits", [1, 4, None])
def test_length_on_the_device(length: int, splits: int | None) -> None:
    """The buffers are full of NaN beyond T, as are the rows of a window that is longer than T."""
    arguments = make(Case(length, sinks=3, recent=min(length, 20), batch=2))
    buffers: dict[str, Any] = {"length": torch.tensor(length, device=DEVICE)}
    for kind in ("keys", "values"):
        tokens = arguments[kind]
        kept = torch.full((2, 2, 120, tokens.kept.shape[3]), torch.nan, device=DEVICE)
        kept[:, :, :length] = tokens.kept
        rows = torch.full((2, 2, 23, tokens.rows.shape[3]), torch.nan, device=DEVICE)
        rows[:, :, :3] = tokens.rows[:, :, :3]
        if length > 3:  # 3 sinks and the window
            rows[:, :, 23 - min(length, 20) :] = tokens.rows[:, :, 3:]
        else:
            rows[:, :, 23 - length :] = tokens.rows[:, :, 3:]
        buffers[kind] = Tokens(kept, rows)
    mask = torch.full((2, 120), torch.nan, device=DEVICE)
    mask[:, :length] = torch.randn(2, length, device=DEVICE)
    buffers["mask"] = mask
    check(arguments | buffers, splits, exact=arguments | {"mask": mask[:, :length]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0, 4])
def test_half_precision(dtype: torch.dtype, bits: int) -> None:
    case = Case(165, 64, 80, 64, 48, sinks=4, recent=32, key_bits=bits, value_bits=bits, key_blocks=4, value_blocks=3)
    check(make(replace(case, dtype=dtype, group=4)))


def test_strides() -> None:
    """Slices of a larger capacity, of odd offset and of [B, T, H, d]; rows and queries that are not contiguous."""
    arguments = make(Case(75, 20, 12, sinks=2, recent=30, batch=2))
    for kind in ("keys", "values"):
        kept, rows = arguments[kind].kept, arguments[kind].rows
        larger = torch.full((2, 2, 101, kept.shape[3] + 3), torch.nan, device=DEVICE)
        larger[:, :, 7:82, 1:-2] = kept
        check(arguments | {kind: Tokens(larger[:, :, 7:82, 1:-2], rows)})
        tokens_first = Tokens(kept.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([rows, rows])[::2])
        odd = torch.cat([rows, rows], -1)[..., : rows.shape[3]]
        check(arguments | {kind: replace(tokens_first, rows=odd)})
    query = arguments["query"].transpose(1, 2).contiguous().transpose(1, 2)
    check(arguments | {"query": query})


@settings(max_examples=25)
@given(data=st.data())
def test_any_case(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 140), "length")
    sinks = data.draw(st.integers(0, 5), "sinks")
    bits = st.sampled_from([0, 2, 4, 8])
    width, residual, blocks = st.integers(1, 40), st.integers(0, 20), st.integers(0, length // 32)
    case = Case(
        length,
        *(data.draw(width, name) for name in ("dk", "dv")),
        *(data.draw(residual, name) for name in ("ek", "ev")),
        group=data.draw(st.integers(1, 8), "group"),
        sinks=sinks,
        recent=data.draw(st.integers(0, length), "recent"),
        batch=data.draw(st.integers(1, 2), "batch"),
        heads=data.draw(st.integers(1, 2), "heads"),
        key_bits=data.draw(bits, "key bits"),
        value_bits=data.draw(bits, "value bits"),
        key_blocks=data.draw(blocks, "key blocks"),
        value_blocks=data.draw(blocks, "value blocks"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    first = torch.tensor(data.draw(st.lists(st.integers(0, length - 1), min_size=case.batch, max_size=case.batch)))
    mask = (torch.arange(length) >= first[:, None]).to(DEVICE) if data.draw(st.booleans(), "padding") else None
    arguments = make(case) | {"mask": mask, "first": first.to(DEVICE) if sinks else None}
    check(arguments, data.draw(st.sampled_from([1, 2, 5, None]), "splits"))


def _three_bits(arguments: dict[str, Any]) -> dict[str, Any]:
    packed = quantise(torch.randn(1, 2, 1, 32, 16, device=DEVICE), 3, "channel")
    return {"keys": replace(arguments["keys"], packed=packed)}


def _other_axis(arguments: dict[str, Any]) -> dict[str, Any]:
    packed = quantise(torch.randn(1, 2, 1, 32, 16, device=DEVICE), 4, "channel")
    return {"values": replace(arguments["values"], packed=packed)}


def _transposed(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"keys": replace(arguments["keys"], kept=arguments["keys"].kept.mT.contiguous().mT)}


def _fewer_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"values": replace(arguments["values"], rows=arguments["values"].rows[:, :, 1:])}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (_three_bits, "keys as integers of 2, 4 or 8 bits in groups of 32 along axis 'channel', got 3 bits"),
        (_other_axis, "values as integers .* axis 'token', got 4 bits, groups of 32, 'channel'"),
        (_transposed, "channels of one token of keys must lie side by side"),
        (_fewer_rows, "residual rows of the same tokens, got 10 and 9"),
        (lambda _: {"first": None}, "sinks need the position"),
        (lambda _: {"length": 41}, "must hold all 41 tokens and the window no more; they hold 40"),
        (lambda _: {"length": 5}, "the window 8"),
        (lambda _: {"mask": torch.ones(1, 39, dtype=torch.bool, device=DEVICE)}, "all 40 tokens .* they hold 39"),
    ],
)
def test_refusals(changes: Any, sentence: str) -> None:
    arguments = make(Case(40, sinks=2, recent=8))
    with pytest.raises(InputError, match=sentence):
        decode(**arguments | changes(arguments))


def test_available() -> None:
    assert kernel.available(torch.zeros(1, device=DEVICE))


def test_default_splits_fill_the_device() -> None:
    """Two programs for each of 132 multiprocessors, in whole waves, and never less than 256 tokens a split."""
    for programs in (1, 8, 100, 128, 132, 300, 2048):
        splits = kernel._fewest_splits(programs, 128, 264)
        waves = programs * splits / 264
        assert programs < 8 or waves / -(-waves // 1) >= 0.85
        assert splits <= 128
    assert kernel._fewest_splits(8, 128, 264) == 30
    assert kernel._default_splits(1, 1000, 64, torch.device("cpu")) <= 1000 // 256


@pytest.mark.parametrize(
    ("recent_window", "sinks", "generated", "ragged", "static"),
    [
        (0, 0, "prune", False, False),
        (4, 2, "prune", True, False),
        (4, 2, "keep", True, False),
        (4, 2, "prune", False, True),
        (500, 3, "prune", False, True),
    ],
)
def test_generation_is_the_same_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, recent_window: int, sinks: int, generated: str, ragged: bool, static: bool
) -> None:
    """Padded rows, grouped queries, read-outs: the kernel beside the plain path."""
    model = tiny_model("Llama", num_hidden_layers=1)
    windows: dict[str, Any] = {"recent_window": recent_window, "sinks": sinks, "generated": generated}
    mask = random_mask(model, 7, values=9, ragged=ragged, readout="static", **windows)
    options: dict[str, Any] = {"max_length": 40} if static else {}
    plain = run(model, grace_opt.runtime.cache(mask, model, **options), new_tokens=5)
    calls = counted(monkeypatch)
    fused = run(model, grace_opt.runtime.cache(mask, model, **options), new_tokens=5)
    assert_same(fused, plain)
    assert len(calls) == 4 * (2 if ragged else 1)


@dataclass(frozen=True)
class EverySecond(TokenPolicy):
    """Of a prompt's old tokens, in rows that begin at their own token."""

    tier: Tier = Tier.COMPRESSED
    name: ClassVar[str] = "every-second"

    def tiers(self, seen: Observed, share: float) -> Tensor:
        at = torch.arange(seen.keys.shape[1], device=seen.keys.device)
        return torch.where(at % 2 == 0, int(self.tier), int(Tier.DROPPED)).to(torch.int8)


@pytest.mark.parametrize("generated", ["keep", "prune"])
@pytest.mark.parametrize("codec", ["channels", "whole", "lowrank"])
def test_tokens_that_stay_are_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch, codec: str, generated: str) -> None:
    """Rows with different numbers of tokens, and codecs of every kind."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static", generated=generated)
    (layer,) = mask.plan
    basis = LowRank(torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(9))
    codecs = {"channels": layer.codecs, "whole": {}, "lowrank": {k: [basis, basis] for k in layer.codecs}}[codec]
    policy: TokenPolicy = Streaming() if codec == "whole" else EverySecond()
    plan = CachePlan({0: replace(layer, codecs=codecs, tokens=TokenRule(policy, 0.5))})
    plain = run(model, grace_opt.runtime.cache(plan, model), new_tokens=5)
    calls = counted(monkeypatch)
    past = grace_opt.runtime.cache(plan, model)
    assert_same(run(model, past, new_tokens=5), plain)
    assert past.layers[0].length < past.get_seq_length()
    assert len(calls) == 4


def test_whole_tokens_anywhere_are_left_to_the_plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    (layer,) = random_mask(model, 7, values=9, recent_window=4, sinks=2).plan
    plan = CachePlan({0: replace(layer, tokens=TokenRule(EverySecond(Tier.WHOLE), 0.5))})
    calls = counted(monkeypatch)
    past = grace_opt.runtime.cache(plan, model)
    run(model, past, new_tokens=5)
    assert not calls
    assert "no whole tokens but sinks" in str(choose.reasons(past.layers[0])["triton"])


@pytest.mark.parametrize("padding", [6, 40, 84])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch, bits: int, padding: int) -> None:
    """Blocks, and what came before and after them, with a padded row that has as many, fewer or none."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 90), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    attended[0, :padding] = 0
    logits = []
    for fused in (False, True):
        calls = counted(monkeypatch) if fused else []
        past = grace_opt.runtime.cache(mask, model, key_bits=bits, value_bits=bits)
        with torch.no_grad():
            model(input_ids=ids[:, :86], attention_mask=attended[:, :86], past_key_values=past)
            for at in range(86, 89):
                out = model(input_ids=ids[:, at : at + 1], attention_mask=attended[:, : at + 1], past_key_values=past)
        logits.append(out.logits)
    assert past.layers[0].key_side.buffer.packed_tokens == 64
    assert len(calls) == 3
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


def test_a_compiled_step_by_the_kernel_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    logits: list[list[Tensor]] = []
    for fused in (False, True):
        calls = counted(monkeypatch) if fused else []
        past = grace_opt.runtime.cache(mask, model, max_length=30)
        torch._dynamo.reset()
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if fused else model.forward
        with torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            logits.append([step(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(6)])
    assert len(calls) == 6
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the runtime use the kernel, and note each call."""
    calls: list[int] = []

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return decode(*arguments)

    monkeypatch.setattr(split, "INTERPRETED", True)
    monkeypatch.setattr(kernel, "decode", noted)
    return calls


def test_the_chooser_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))

    def reasons_for(generated: str = "prune", **options: Any) -> dict[str, bool | str]:
        mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, generated=generated)
        with grace_opt.runtime.cache(mask, model, **options) as past, torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            found = choose.reasons(past.layers[0])
        assert found["plain"] is True
        return found

    if DEVICE.type == "cpu":
        assert "cards" in str(reasons_for()["triton"])
    monkeypatch.setattr(split, "INTERPRETED", True)
    assert reasons_for()["triton"] is True
    assert reasons_for("keep")["triton"] is True
    assert "integers of both sides or none" in str(reasons_for(key_bits=4)["triton"])
    assert "codes within bytes" in str(reasons_for(key_bits=3, value_bits=3)["triton"])
    assert "preallocated" in str(reasons_for("keep", max_length=80)["triton"])
