"""Packed integers: lossless packing, the exact byte count, the error bound, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace_opt import InputError
from grace_opt.compression import integers
from grace_opt.compression.integers import Packed, bits_per_element, quantise, rounded

BITS: Any = [2, 3, 4, 8]
AXES: Any = ["channel", "token"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LIMIT = 65280.0  # the largest bfloat16 that is not above the largest float16, 65504
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative, to nearest


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """[..., T, d] of any layout and scale, also far from zero, with outliers and with constant rows."""
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 40)), draw(st.integers(1, 40))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        x[..., 0] = 30.0 * x[..., 0]
    if draw(st.booleans()):
        x[..., 0, :] = x[..., 0, :1]
        x[..., :, -1] = x[..., :1, -1]
    x = 10.0 ** draw(st.integers(-9, 2)) * x + draw(st.sampled_from([0.0, 1.0, -1 / 3, 3000.1, -60000.0]))
    if draw(st.booleans()):
        x = x.mT.contiguous().mT
    return x.clamp(-LIMIT, LIMIT).to(draw(st.sampled_from(DTYPES)))


def groups(x: torch.Tensor, packed: Packed) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(elements [..., R, l], scale [..., R], zero [..., R]) of each group in turn, in float64."""
    rows = (x.mT if packed.axis == "channel" else x).double()
    for index, elements in enumerate(rows.split(packed.group, dim=-1)):
        yield elements, packed.scale[..., index].double(), packed.zero[..., index].double()


@given(bits=st.sampled_from(BITS), length=st.integers(1, 67), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_codes_are_packed_without_loss_lowest_bits_first(bits: Any, length: int, rows: int, seed: int) -> None:
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (rows, length), generator=torch.Generator().manual_seed(seed))
    codes[:, 0], codes[:, -1] = 0, top  # a scale of 1 and a zero of 0, unless there is one element only
    packed = quantise(codes.float(), bits, "token", group=length)
    if length > 1:
        assert packed.scale.eq(1).all()
        assert packed.zero.eq(0).all()
        for row, held in zip(codes.tolist(), packed.codes.tolist(), strict=True):
            expected = sum(code << bits * index for index, code in enumerate(row))
            assert int.from_bytes(bytes(held), "little") == expected
    assert torch.equal(packed.unpack(), codes.float())


@given(x=tensors(), bits=st.sampled_from(BITS), axis=st.sampled_from(AXES), group=st.sampled_from([1, 7, 32, 64]))
def test_error_is_at_most_half_a_scale(x: torch.Tensor, bits: Any, axis: Any, group: int) -> None:
    packed = quantise(x, bits, axis, group)
    back = packed.unpack()
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert back.is_contiguous()
    rounding = ROUNDING[x.dtype]
    pairs = zip(groups(x, packed), groups(back, packed), strict=True)
    for (elements, scale, zero), (read, _, _) in pairs:
        largest = elements.abs().amax(-1)
        exact = scale / 2 + 2.0**-21 * largest
        bound = exact + rounding * (largest + exact) + 2.0**-25  # the last for float16's subnormals
        assert ((read - elements).abs().amax(-1) <= bound).all()
        low, high = elements.amin(-1), elements.amax(-1)
        assert (zero <= low).all()
        # Nor is the scale wastefully wide: one rounding of the zero and one of the scale itself.
        stored = ROUNDING[packed.zero.dtype]
        wide = (high - low + 2 * stored * low.abs() + 2.0**-24) / (2**bits - 1)
        assert (scale <= wide * (1 + 2 * stored) * (1 + 2.0**-20) + 2.0**-24).all()


@given(x=tensors(), bits=st.sampled_from(BITS), axis=st.sampled_from(AXES), group=st.sampled_from([1, 7, 32, 64]))
def test_rounding_alone_is_what_comes_back(x: torch.Tensor, bits: Any, axis: Any, group: int) -> None:
    before = x.clone()
    assert torch.equal(rounded(x, bits, axis, group), quantise(x, bits, axis, group).unpack())
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 33, 5), (4, 64, 96), (2, 31, 127), (100, 32)])
def test_bytes_are_exactly_those_of_bits_and_groups(shape: tuple[int, ...], bits: Any, axis: Any) -> None:
    *leading, tokens, channels = shape
    rows, length = (channels, tokens) if axis == "channel" else (tokens, channels)
    whole_bytes, rest = divmod(length * bits, 8)
    a_row = whole_bytes + (rest > 0) + (2 + 2) * -(-length // 32)  # a scale and a zero of 16 bits for each group
    heads = 1
    for size in leading:
        heads *= size
    for dtype in DTYPES:
        packed = quantise(torch.randn(shape).to(dtype), bits, axis)
        assert packed.nbytes == heads * rows * a_row
        held = [packed.codes, packed.scale, packed.zero]
        assert sum(each.untyped_storage().nbytes() for each in held) == packed.nbytes  # nothing larger behind a view
        assert bits_per_element(packed) == 8 * packed.nbytes / (heads * tokens * channels)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_three_bits_take_three_bits(bits: Any, axis: Any) -> None:
    packed = quantise(torch.randn(2, 256, 64), bits, axis)
    assert packed.codes.numel() * 8 == bits * 2 * 256 * 64
    assert bits_per_element(packed) == bits + 1  # 32 bits for each group of 32


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
def test_heads_do_not_touch_each_other(bits: Any, axis: Any) -> None:
    x = torch.randn(2, 3, 45, 13)
    one, other = quantise(x, bits, axis), quantise(x.transpose(0, 1), bits, axis)
    assert torch.equal(one.codes.transpose(0, 1), other.codes)
    assert torch.equal(one.unpack().transpose(0, 1), other.unpack())
    for batch in range(2):
        for head in range(3):
            assert torch.equal(quantise(x[batch, head], bits, axis).unpack(), one.unpack()[batch, head])


def test_axes_are_each_others_transpose() -> None:
    x = torch.randn(3, 50, 20)
    assert torch.equal(quantise(x, 3, "channel").unpack(), quantise(x.mT, 3, "token").unpack().mT)


def test_groups_run_over_tokens_for_keys_and_over_channels_for_values() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1000.0  # an outlier channel: harmless to the others if each channel has its own scale
    others = [channel for channel in range(64) if channel != 5]
    error = {axis: (quantise(x, 4, axis).unpack() - x)[:, others].abs().max() for axis in AXES}
    assert error["channel"] < 0.25
    assert error["token"] > 1.0
    changed = x.clone()
    changed[32:] += 100.0
    assert torch.equal(quantise(changed, 4, "channel").unpack()[:32], quantise(x, 4, "channel").unpack()[:32])


@given(x=tensors(), axis=st.sampled_from(AXES))
def test_more_bits_never_have_a_larger_error_bound(x: torch.Tensor, axis: Any) -> None:
    scales = [quantise(x, bits, axis).scale for bits in BITS]
    for coarse, fine in pairwise(scales):
        assert (fine <= coarse).all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8, 0), (0, 8, 8), (0, 0)])
def test_empty(shape: tuple[int, ...], bits: Any, axis: Any) -> None:
    packed = quantise(torch.empty(shape, dtype=torch.bfloat16), bits, axis)
    assert packed.nbytes == bits_per_element(packed) == 0
    assert packed.unpack().shape == shape
    assert packed.unpack().dtype == torch.bfloat16


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -2.5, 0.1, -0.1, 1e-6, -1e-6, 1e-30, -1e-30, 2049.0, -65504.0, 65504.0]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_come_back(bits: Any, dtype: torch.dtype, value: float) -> None:
    x = torch.full((40, 3), value).clamp(-LIMIT, LIMIT).to(dtype)
    packed = quantise(x, bits, "channel")
    back = packed.unpack()
    if torch.equal(x.to(packed.zero.dtype).to(dtype), x):
        assert torch.equal(back, x)
    else:
        rounded = x.half().float()
        assert (back - x).abs().max() <= max(2.0**-11 * abs(value), 2.0**-25)
        assert (back - x).abs().max() <= (rounded - x).abs().max() + packed.scale.max() / 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_whole_range_of_float16_stays_finite(dtype: torch.dtype, bits: Any) -> None:
    x = torch.linspace(-65504, 65504, 32).clamp(-65504, 65504)[:, None].to(dtype)
    packed = quantise(x, bits, "channel")
    back = packed.unpack()
    assert back.isfinite().all()
    assert (back.double() - x.double()).abs().max() <= packed.scale.double().max() / 2 + 32


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65536.0, -1e30])
def test_what_float16_cannot_reach_is_refused(value: float, axis: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 40, 40).to(dtype)
        x[1, -1, -1] = value
        with pytest.raises(InputError, match="not finite or beyond 65504"):
            quantise(x, 4, axis)


def test_wrong_arguments_are_named() -> None:
    x: Any = torch.randn(4, 4)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x, 5, "token"), "2, 3, 4 or 8 bits, got 5"),
        ((x, 4, "key"), "'channel' or 'token', got 'key'"),
        ((x, 4, "token", 0), "at least 1 element, got 0"),
        ((x[0], 4, "token"), r"got torch.float32\[4\]"),
        ((x.int(), 4, "token"), r"got torch.int32\[4, 4\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            quantise(*arguments)


def test_gradients_and_the_input_are_left_alone() -> None:
    x = torch.randn(40, 8, requires_grad=True)
    before = x.detach().clone()
    packed = quantise(x, 2, "token")
    assert torch.equal(x, before)
    assert not packed.scale.requires_grad
    assert not packed.unpack().requires_grad


def test_uniform_noise_has_the_error_that_theory_says() -> None:
    # Mean squared error of rounding is scale^2 / 12; the ends of a group are exact, so a little less.
    x = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0))
    for bits in BITS:
        packed = quantise(x, bits, "channel", group=1024)
        error = float((packed.unpack() - x).square().mean())
        assert error == pytest.approx(float(packed.scale.float().square().mean()) / 12, rel=0.05)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(2, 3, 32, 25), (3, 7, 5), (40, 33), (1, 1, 64, 1)], ids=str)
def test_compiled_loops_give_the_same_bits(
    axis: Any, bits: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=rng) * 10 ** torch.randn(shape, generator=rng)
    x.view(-1)[::3] = x.view(-1)[0]  # ties, and groups of equal elements
    found = {}
    for large in (1, 1 << 40):
        monkeypatch.setattr(integers, "_LARGE", large)
        packed = quantise(x, bits, axis, 32)
        found[large] = [packed.codes, packed.scale, packed.zero, packed.unpack()]
    assert all(map(torch.equal, *found.values()))
    monkeypatch.setattr(integers, "_LARGE", 1)
    for wrong in (torch.nan, torch.inf, -70000.0):
        for at in range(0, x.numel(), 7):
            bad = x.clone()
            bad.view(-1)[at] = wrong
            with pytest.raises(InputError, match="not finite or beyond 65504"):
                quantise(bad, bits, axis, 32)
