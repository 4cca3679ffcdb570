"""Packed integers as a card's kernel reads them (`grace_opt.runtime.kernels.triton_codes`).

The codes, scales and zeros are those of `Integers`; only where they lie differs. Two blocks of 32 tokens are one of 64.
Products on tensor cores take what is summed over side by side, so codes of keys lie by channel and those of values by
token. Four codes that lie side by side hold elements 0, 2, 1, 3, so that two neighbours come out of a word by one mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.compression.integers import GROUP, Integers, quantise

BLOCK = 2 * GROUP
DEVICES = {"cuda"}  # where integers are held so
BITS = (4, 8)
_SWAP = [0, 2, 1, 3]  # its own inverse


@dataclass(frozen=True, eq=False)
class Tiles(Integers):
    """Integers of 4 or 8 bits in blocks of 64 tokens.

    ``pack`` gives two tensors. Codes: uint8[.., 1, 32, D] of keys and [.., 1, D, 32] of values: in 4 bits, a byte has a
    token of the first 32 in its low half and the one 32 further in its high half; in 8 bits there are two in place of
    one. Scales: int32[.., 2, D] of keys (of the first 32 tokens and the others), [.., D / 32, 64] of values: the scale
    in the low half, the zero in the high one, as the 16 bits of the stored dtype. D: the width, as `padded`.
    """

    @property
    def block(self) -> int:
        return BLOCK

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        prompt = z.shape[-3] > 1  # which may wait for the device; a block that fills up as tokens come does not
        # Filled up with the last channel, which changes no group's minimum or maximum.
        rows = torch.cat([z, z[..., -1:].expand(*z.shape[:-1], padded(self.width) - self.width)], dim=-1)
        packed = quantise(_split(rows, -2, 2), self.bits, self.axis, GROUP, waits=prompt)
        codes = packed.levels()  # keys [.., 2, D, 32], values [.., 2, 32, D]
        codes = _swapped(codes.mT.contiguous())
        held = codes if self.bits == 8 else codes[..., :1, :, :] | codes[..., 1:, :, :] << 4
        both = torch.stack([packed.scale, packed.zero], dim=-1).view(torch.int32)[..., 0]
        # [.., 2, D, 1] -> [.., 2, D] and [.., 2, 32, groups] -> [.., groups, 64]
        scales = both[..., 0] if self.axis == "channel" else both.movedim(-1, -3).flatten(-2)
        return held.contiguous(), scales.contiguous()

    def unpack(self, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = held
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-3)
        codes = _swapped(codes)
        stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        scale, zero = (each.float() for each in scales.contiguous()[..., None].view(stored).unbind(-1))
        if self.axis == "channel":
            scale, zero = scale[..., None, :], zero[..., None, :]  # [.., 2, 1, D]
        else:
            codes = codes.mT  # [.., 2, 32, D]
            scale, zero = (
                _split(each, -1, 2).movedim(-3, -1).repeat_interleave(GROUP, dim=-1)[..., : codes.shape[-1]]
                for each in (scale, zero)
            )
        rows: Tensor = (codes * scale + zero).clamp_(-65504.0, 65504.0).to(dtype)
        return rows.flatten(-3, -2)[..., : self.width].contiguous()

    def nbytes(self, tokens: int, itemsize: int) -> int:
        width = padded(self.width)
        scales = 4 * (2 * width if self.axis == "channel" else -(-width // GROUP) * BLOCK)
        block = BLOCK * width * self.bits // 8 + scales
        return tokens // BLOCK * block + tokens % BLOCK * self.width * itemsize


def _split(x: Tensor, dim: int, count: int) -> Tensor:
    """A dimension as two, of ``count`` and what is left."""
    found: Tensor = x.unflatten(dim, (count, -1))  # type: ignore[no-untyped-call]
    return found


def _swapped(codes: Tensor) -> Tensor:
    """Of each four side by side, the inner two exchanged."""
    return codes.view(*codes.shape[:-1], -1, 4)[..., _SWAP].flatten(-2)


def padded(width: int) -> int:
    """Channels that a tile has for so many: a multiple of 16 and the sum of two powers of 2, or one."""
    large, small = pieces(max(16, -(-width // 16) * 16))
    return large + small


def pieces(width: int) -> tuple[int, int]:
    """The largest power of 2 in a width, and what is left of it, as the next power of 2; 0 if nothing is."""
    large = 1 << (width.bit_length() - 1)
    return large, 0 if width == large else 1 << (width - large - 1).bit_length()


def arranged(codec: Codec, device: torch.device) -> Codec:
    """A codec whose packed rows lie as this device's kernel reads them."""
    if isinstance(codec, Integers) and codec.bits in BITS and device.type in DEVICES:
        return Tiles(codec.inner, codec.bits, codec.axis)
    return codec
