"""The Triton kernels, interpreted, against attention over whole tokens in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Whole as WholeRows
from grace_opt.compression.tiles import BLOCK, Tiles
from grace_opt.runtime.kernels import triton as kernel
from grace_opt.runtime.kernels.triton import Codes, Stored, Whole, decode

# conftest.py sets TRITON_INTERPRET before anything imports Triton; TRITON_INTERPRET=0 runs these tests on a card.
DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
# The interpreter's numpy says when a mask of float32's minimum passes to -inf, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """Random tokens of width dk + ek and dv + ev, as a cache holds them; see `made`."""

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
    dtype: torch.dtype = torch.float32
    readout: bool = True
    stored: bool = False  # whether the last token is, already
    first: tuple[int, ...] = ()  # of each row; zeros if not given
    spare: int = 7  # rows and residuals for which there is room
    bits: tuple[int, int] = (0, 0)  # of packed keys and values
    blocks: tuple[int, ...] = ()  # of each row of the batch, from behind its sinks on
    seed: int = 0


@dataclass
class Made:
    """Arguments of `decode`, and the tokens as attention must see them, float64[B, H, T, n] of keys and values."""

    arguments: dict[str, Any]
    seen: list[Tensor]


def made(case: Case) -> Made:
    """What is not written yet, or not for this length, is NaN."""
    torch.manual_seed(case.seed)
    first = torch.tensor(case.first or [0] * case.batch)
    slots = torch.arange(case.length)
    near = slots >= case.length - case.recent
    whole = near | ((slots >= first[:, None]) & (slots < first[:, None] + case.sinks))
    sides, seen = [], []
    for i, (d, e) in enumerate(((case.dk, case.ek), (case.dv, case.ev))):
        x = torch.randn(case.batch, case.heads, case.length, d + e).to(case.dtype)
        codec = _codec(case, d, e)
        row = codec.encode(x)
        residual = codec.residual(x.double(), row.double()).to(case.dtype)
        rest = torch.where(whole[:, None, :, None], residual, 0).double()
        codes, from_codes = packed(case, row, first, i)
        seen.append(codec.read(from_codes.double(), rest))
        pitch = -(-d // 8) * 8 if case.dtype.itemsize == 2 else d
        rows = _nan(case, case.length + case.spare, pitch)
        rows[..., d:] = 0
        held = case.length - (not case.stored)
        rows[:, :, :held, :d] = row[:, :, :held]
        for b, count in enumerate(case.blocks):
            if count:
                rows[b, :, : first[b] + case.sinks + BLOCK * count] = torch.nan
        ring = _nan(case, case.recent + case.spare, e)
        last = torch.arange(max(0, case.length - ring.shape[2]), held)
        ring[:, :, last % ring.shape[2]] = residual[:, :, last]
        sinks = torch.zeros(case.batch, case.heads, case.sinks, e, dtype=case.dtype)
        for b in range(case.batch):
            there = residual[b, :, first[b] : first[b] + case.sinks]
            sinks[b, :, : there.shape[1]] = there
        new = None if case.stored else x[:, :, -1:].to(DEVICE)
        readout = [None if each is None else each.to(DEVICE, case.dtype) for each in (codec.matrix, codec.constant)]
        sides.append(
            Stored(
                *(rows.to(DEVICE), d, ring.to(DEVICE), 0, sinks.to(DEVICE)),
                codec.order.to(DEVICE),
                *readout,
                new,
                codes=codes,
            )
        )
    query = torch.randn(case.batch, case.heads * case.group, 1, case.dk + case.ek).to(DEVICE, case.dtype)
    arguments = {
        "query": query,
        "keys": sides[0],
        "values": sides[1],
        "length": case.length,
        "first": first.to(DEVICE),
        "whole": Whole(case.sinks, case.recent),
        "mask": None,
        "scaling": query.shape[-1] ** -0.5,
    }
    return Made(arguments, seen)


def packed(case: Case, row: Tensor, first: Tensor, kind: int) -> tuple[Codes | None, Tensor]:
    """Rows [B, H, T, d] with their blocks packed, and as they come back."""
    if not case.blocks:
        return None, row
    axis: Any = ("channel", "token")[kind]
    tiles = Tiles(WholeRows(row.shape[3]), case.bits[kind], axis)  # type: ignore[arg-type]
    most, back = max(case.blocks) + 2, row.clone()
    like = tiles.pack(row.new_zeros(case.batch, case.heads, most, BLOCK, row.shape[3]))
    held = [torch.full_like(each, 85) for each in like]
    head = torch.full((case.batch, case.heads, case.sinks, row.shape[3]), torch.nan, dtype=row.dtype)
    for b, count in enumerate(case.blocks):
        if count:
            at = int(first[b]) + case.sinks
            new = tiles.pack(row[b, :, at : at + BLOCK * count].unflatten(1, (count, BLOCK)))
            for each, part in zip(held, new, strict=True):
                each[b, :, :count] = part
            back[b, :, at : at + BLOCK * count] = tiles.unpack(new, row.dtype).flatten(1, 2)
            head[b] = row[b, :, first[b] : at]
    counts = torch.tensor(case.blocks, dtype=torch.int32)
    return Codes(*(each.to(DEVICE) for each in (*held, counts)), case.bits[kind], head.to(DEVICE)), back


def _codec(case: Case, d: int, e: int) -> Channels:
    """Random channels and, maybe, a random read-out, in float64 but as the dtype rounds it."""
    order = torch.stack([torch.randperm(d + e) for _ in range(case.heads)])[None]
    order = torch.cat([order[..., :d].sort(-1).values, order[..., d:].sort(-1).values], dim=-1)
    if not case.readout:
        return Channels(order, d)
    matrix = (0.3 * torch.randn(1, case.heads, e, d)).to(case.dtype).double()
    return Channels(order, d, matrix, torch.randn(1, case.heads, e).to(case.dtype).double())


def _nan(case: Case, tokens: int, width: int) -> Tensor:
    return torch.full((case.batch, case.heads, tokens, width), torch.nan, dtype=case.dtype)


def expected(given: Made) -> Tensor:
    """A softmax over all tokens of a row from its first one on, in float64."""
    of = given.arguments
    keys, values = given.seen
    batch, heads, length, _ = keys.shape
    query = of["query"].double().cpu().view(batch, heads, -1, keys.shape[3])
    scores = query @ keys.mT * of["scaling"]
    seen = (torch.arange(length) >= of["first"].cpu()[:, None])[:, None, None]
    if (mask := of["mask"]) is not None:
        mask = mask.cpu()[:, None, None, :length]
        scores, seen = (scores, seen & mask) if mask.dtype == torch.bool else (scores + mask.double(), seen)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ values).view(batch, -1, 1, values.shape[3])


def check(given: Made, parts: int | None = 2, **changes: Any) -> Tensor:
    """decode is what the definition gives; the new token is stored."""
    given.arguments |= {name: each for name, each in changes.items() if name != "length"}
    of = given.arguments | changes
    query = of["query"]
    got = decode(**of, parts=parts)
    assert got.dtype == query.dtype
    torch.testing.assert_close(got.double().cpu(), expected(given), atol=TOLERANCE[query.dtype], rtol=0)
    for side in (of["keys"], of["values"]):
        if side.new is not None:
            slot = given.seen[0].shape[2] - 1
            row = side.rows[:, :, slot].cpu()
            kept = side.order[..., : side.width].cpu().expand(len(row), -1, -1)
            assert torch.equal(row[..., : side.width], side.new[:, :, 0].cpu().gather(-1, kept))
            assert not row[..., side.width :].any()
    return got


@pytest.mark.parametrize("length", [1, 5, 33, 257, 1000])
@pytest.mark.parametrize("parts", [1, 7, None])
def test_lengths_and_parts(length: int, parts: int | None) -> None:
    check(made(Case(length, sinks=2, recent=min(length, 40))), parts)


def test_more_parts_than_are_merged_at_a_time() -> None:
    """Later parts weigh more, so what was merged before them is rescaled."""
    check(made(Case(1200, recent=9)), 19, mask=torch.linspace(0, 5, 1200, device=DEVICE)[None])


@pytest.mark.parametrize(
    ("dk", "dv", "ek", "ev"),
    [(8, 16, 24, 0), (16, 8, 0, 24), (24, 40, 0, 0), (40, 24, 24, 40), (64, 80, 64, 48), (80, 64, 5, 3), (5, 3, 1, 9)],
)
@pytest.mark.parametrize("recent", [0, 3, 100])
def test_widths_and_windows(dk: int, dv: int, ek: int, ev: int, recent: int) -> None:
    """A window longer than the tokens; sinks within the window."""
    check(made(Case(99, dk, dv, ek, ev, recent=recent, sinks=recent % 4)))


@pytest.mark.parametrize("group", [1, 3, 8, 12, 33])
def test_query_heads(group: int) -> None:
    check(made(Case(90, group=group, sinks=group % 6, recent=9, heads=3)), None)


@pytest.mark.parametrize("sinks", [0, 1, 5])
@pytest.mark.parametrize("recent", [0, 7, 200])
def test_left_padding(sinks: int, recent: int) -> None:
    """Rows of a batch begin at their own token; with a window that reaches over sinks and padding."""
    given = made(Case(200, sinks=sinks, recent=recent, batch=3, first=(0, 29, 197)))
    check(given, mask=(torch.arange(210) >= torch.tensor([[0], [29], [197]])).to(DEVICE))
    check(given, mask=None)  # what is before a row's first token is not read at all


def test_additive_mask() -> None:
    given = made(Case(150, sinks=2, recent=8, batch=2))
    mask = torch.randn(2, 155, device=DEVICE)
    mask[0, :13] = -torch.inf
    mask[1, 40:60] = torch.finfo(torch.float32).min
    for each in (mask, mask[1:], mask.bfloat16(), mask.t().contiguous().t()):
        check(given, mask=each)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_row_that_sees_nothing_is_zero(parts: int) -> None:
    """And one that sees a single token is that token, whatever the other parts hold."""
    given = made(Case(250, sinks=1, recent=8, batch=3))
    mask = torch.zeros(3, 250, dtype=torch.bool, device=DEVICE)
    mask[1, 77] = True
    got = check(given, parts, mask=mask)
    assert not got[0].any()
    got = decode(**given.arguments | {"mask": torch.where(mask, 0.0, torch.finfo(torch.float32).min)}, parts=parts)
    token = given.seen[1][1, :, 77].repeat_interleave(2, dim=0)[:, None].float()
    torch.testing.assert_close(got[1].cpu(), token, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 6, 95, 300])
@pytest.mark.parametrize("parts", [1, 4, None])
def test_length_on_the_device(length: int, parts: int | None) -> None:
    """The buffers are full of NaN beyond T, as is a ring for a window that is longer than T."""
    given = made(Case(length, sinks=3, recent=20, batch=2, spare=130))
    mask = torch.full((2, length + 130), torch.nan, device=DEVICE)
    mask[:, :length] = torch.randn(2, length, device=DEVICE)
    check(given, parts, length=torch.tensor(length, device=DEVICE), mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Widths that fill no 16 bytes, in rows that do."""
    check(made(Case(260, 51, 77, 77, 51, sinks=4, recent=32, group=4, dtype=dtype)))


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_the_new_token_is_stored_once(stored: bool, readout: bool) -> None:
    check(made(Case(80, sinks=2, recent=11, stored=stored, readout=readout)))


def test_channels_as_they_lie() -> None:
    """Without an order, as other codecs' rows come, and whole tokens; read-outs of each row of the batch."""
    given = made(Case(100, sinks=2, recent=9, readout=False, batch=2))
    both = decode(**given.arguments)
    for name in ("keys", "values"):
        side = given.arguments[name]
        own = side.order.expand(2, -1, -1)
        given.arguments[name] = replace(side, order=own.contiguous())
    assert torch.equal(decode(**given.arguments), both)
    plain = made(Case(100, ek=0, ev=0, readout=False))
    for name, tokens in zip(("keys", "values"), plain.seen, strict=True):
        side = plain.arguments[name]
        side.rows[:, :, :100] = tokens
        plain.arguments[name] = replace(side, order=None, new=tokens[:, :, -1:].float().to(DEVICE))
    got = decode(**plain.arguments)
    torch.testing.assert_close(got.double().cpu(), expected(plain), atol=2e-5, rtol=0)


@pytest.mark.parametrize("far", [0, 1])
def test_offsets_beyond_what_32_bits_count(far: int) -> None:
    """Rows of the batch, or heads, lie more than 2^31 elements apart; memory that nothing touches is not taken."""
    given = made(Case(140, batch=2 - far, heads=1 + far, sinks=1, recent=4, spare=0, dtype=torch.bfloat16))
    for name in ("keys", "values"):
        rows = given.arguments[name].rows
        strides = [0, 0, rows.stride(2), 1]
        strides[far] = 2**31 + 64
        apart = torch.empty(strides[far] + rows[0, 0].numel(), dtype=rows.dtype, device=DEVICE)
        given.arguments[name] = replace(given.arguments[name], rows=apart.as_strided(rows.shape, strides).copy_(rows))
    check(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "dk", "dv"), [((4, 4), 48, 48), ((8, 8), 51, 80), ((4, 8), 128, 112), ((8, 4), 16, 13)]
)
@pytest.mark.parametrize("parts", [1, 3])
def test_integers(bits: tuple[int, int], dk: int, dv: int, dtype: torch.dtype, parts: int) -> None:
    """Rows of a batch with more blocks than are read at a time, with few, and with none."""
    case = Case(600, dk, dv, 9, 3, batch=3, sinks=2, recent=40, first=(0, 290, 503), dtype=dtype)
    given = made(replace(case, bits=bits, blocks=(8, 3, 0)))
    check(given, parts)
    mask = torch.randn(3, 600, device=DEVICE)
    mask[0, 100:300] = -torch.inf
    check(given, parts, mask=mask)
    check(given, parts, mask=mask > -0.5)


@settings(max_examples=20)
@given(data=st.data())
def test_any_case(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 200), "length")
    width, residual = st.integers(1, 40), st.integers(0, 20)
    batch = data.draw(st.integers(1, 2), "batch")
    case = Case(
        length,
        *(data.draw(width, name) for name in ("dk", "dv")),
        *(data.draw(residual, name) for name in ("ek", "ev")),
        group=data.draw(st.integers(1, 9), "group"),
        sinks=data.draw(st.integers(0, 5), "sinks"),
        recent=data.draw(st.integers(0, length), "recent"),
        batch=batch,
        heads=data.draw(st.integers(1, 2), "heads"),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype"),
        readout=data.draw(st.booleans(), "readout"),
        first=tuple(data.draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch), "first")),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    if not case.recent:
        case = replace(case, stored=True)  # as the runtime does
    mask = torch.randn(batch, length).to(DEVICE) if data.draw(st.booleans(), "mask") else None
    check(made(case), data.draw(st.sampled_from([1, 2, 5, None]), "parts"), mask=mask)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    of = made(Case(40)).arguments
    assert kernel.missing(of["query"]) is None
    assert kernel.too_wide(of["keys"], of["values"]) is None
    wide = replace(of["keys"], rows=torch.empty(1, 1, 1, 2048), width=2048)
    assert "101376 bytes of shared memory" in str(kernel.too_wide(wide, wide))
    monkeypatch.setattr(kernel.triton, "__version__", "3.2.0")
    assert "needs Triton 3.3 or newer, and this is 3.2.0" in str(kernel.missing(of["query"]))
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    if DEVICE.type == "cpu":
        assert kernel.missing(of["query"]) == "it runs on cards"
    card = torch.empty(1)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0" in str(kernel.missing(card))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in str(kernel.missing(card))
