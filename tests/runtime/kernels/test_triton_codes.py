"""The PTX that makes elements of codes, run line by line; the interpreter knows none."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from grace_opt.compression.codec import Whole
from grace_opt.compression.integers import quantise
from grace_opt.compression.tiles import Tiles, padded, pieces
from grace_opt.runtime.kernels import triton_codes

BFLOAT, HALF = torch.bfloat16, torch.float16


def run(code: str, inputs: dict[str, int], outputs: int) -> list[int]:
    """The registers $0, $1 .. of 32 bits after a block of PTX."""
    held: dict[str, int] = dict(inputs)

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return held[name] if name in held else int(name, 0)

    def pairs(words: list[int], dtype: torch.dtype, operation: str) -> int:
        x = [torch.tensor(np.array([word], np.uint32).view(np.int16)).view(dtype).double() for word in words]
        made = x[0] * x[1] + x[2] if operation == "fma" else x[0] - x[1]
        return int(made.to(dtype).view(torch.int16).numpy().view(np.uint32)[0])

    def single(word: int) -> float:
        return float(struct.unpack("f", struct.pack("I", word))[0])

    for line in code.strip(" {}\n").split(";"):
        if not (line := line.strip()) or line.startswith(".reg"):
            continue
        operation, *names = re.split(r"[\s,]+", line)
        target, *given = names
        a = [value(name) for name in given]
        kind = operation.split(".")
        if operation == "mov.b32":
            held[target] = a[0]
        elif operation == "shl.b32":
            held[target] = a[0] << a[1] & 0xFFFFFFFF
        elif operation == "shr.u32":
            held[target] = a[0] >> a[1]
        elif operation == "lop3.b32":
            assert a[3] == 0xEA
            held[target] = a[0] & a[1] | a[2]
        elif operation == "prmt.b32":
            source = a[0].to_bytes(4, "little") + a[1].to_bytes(4, "little")
            held[target] = int.from_bytes(bytes(source[a[2] >> 4 * i & 7] for i in range(4)), "little")
        elif operation == "sub.rn.f32":
            held[target] = struct.unpack("I", struct.pack("f", single(a[0]) - single(a[1])))[0]
        elif operation == "cvt.rn.bf16x2.f32":  # the first operand goes into the upper half
            both = torch.tensor([single(a[1]), single(a[0])]).bfloat16().view(torch.int16).numpy()
            held[target] = int(both.view(np.uint32)[0])
        elif kind[-1] in ("f16x2", "bf16x2"):
            held[target] = pairs(a, HALF if kind[-1] == "f16x2" else BFLOAT, kind[0])
        else:
            raise AssertionError(f"unknown: {line}")
    return [held[f"${i}"] for i in range(outputs)]


def elements(words: list[int], dtype: torch.dtype) -> list[float]:
    return [float(x) for x in torch.from_numpy(np.array(words, np.uint32).view(np.int16)).view(dtype)]


@pytest.mark.parametrize(("dtype", "plus"), [(BFLOAT, 16), (HALF, 0)])
def test_nibbles(dtype: torch.dtype, plus: int) -> None:
    """Of every byte in every place; bytes lie in the order 0, 2, 1, 3."""
    code = (triton_codes._BFLOAT_NIBBLES if dtype == BFLOAT else triton_codes._HALF_NIBBLES).value
    for byte in range(256):
        four = [byte, byte * 7 % 256, 255 - byte, byte ^ 90]
        word = int.from_bytes(bytes(four[i] for i in (0, 2, 1, 3)), "little")
        found = elements(run(code, {"$4": word}, 4), dtype)
        assert found == [plus + x % 16 for x in four] + [plus + x // 16 for x in four]


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_bytes(dtype: torch.dtype) -> None:
    code = (triton_codes._BFLOAT_BYTES if dtype == BFLOAT else triton_codes._HALF_BYTES).value
    for byte in range(256):
        four = [byte, byte * 7 % 256, 255 - byte, byte ^ 90]
        word = int.from_bytes(bytes(four[i] for i in (0, 2, 1, 3)), "little")
        assert elements(run(code, {"$2": word}, 2), dtype) == four


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_scales_and_zeros(dtype: torch.dtype) -> None:
    scale, zero = torch.rand(2, 2).to(dtype)
    words = torch.stack([scale, zero], dim=-1).view(torch.int32)[..., 0].numpy().view(np.uint32)
    given = {"$2": int(words[0]), "$3": int(words[1])}
    found = run(triton_codes._PAIRS.value, given, 2)
    assert elements(found[:1], dtype) == scale.tolist()
    assert elements(found[1:], dtype) == zero.tolist()
    if dtype == BFLOAT:
        found = run(triton_codes._LESS_SIXTEEN.value, given, 2)
        assert elements(found[:1], dtype) == scale.tolist()
        assert elements(found[1:], dtype) == (zero.double() - 16 * scale.double()).to(dtype).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT, HALF])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("width", [13, 48, 51, 100])
def test_tiles_hold_what_integers_do(dtype: torch.dtype, bits: int, axis: str, width: int) -> None:
    """And as many bytes as they say; channels that fill a tile up change nothing."""
    rows = 3 + torch.randn(2, 3, 4, 64, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiles = Tiles(Whole(width), bits, axis)  # type: ignore[arg-type]
    held = tiles.pack(rows)
    assert sum(each.nbytes for each in held) == 2 * 3 * tiles.nbytes(4 * 64, dtype.itemsize)
    expected = quantise(rows.unflatten(-2, (2, 32)), bits, axis).unpack().flatten(-3, -2)  # type: ignore[arg-type,no-untyped-call]
    assert torch.equal(tiles.unpack(held, dtype), expected)


def test_widths_of_tiles() -> None:
    assert [padded(width) for width in (1, 16, 17, 48, 51, 80, 96, 100, 112, 128)] == [
        *(16, 16, 32, 48, 64, 80, 96, 128, 128, 128)
    ]
    assert pieces(48) == (32, 16)
    assert pieces(64) == (64, 0)
