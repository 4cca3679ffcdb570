"""Where a cache layer holds the kept channels of its tokens: growing, preallocated, or as packed integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from grace_opt.compression.integers import Axis, Bits, Packed, quantise

GROUP = 32  # tokens of one block of integers
_BLOCKS = 64  # of integers that are unpacked at a time


class Store(Protocol):
    """The kept channels of tokens, [B, H, T, d]."""

    @property
    def tokens(self) -> Tensor:
        """[B, H, _, d]: those that are held as they came, in order."""

    @property
    def fixed(self) -> int:
        """How many of the first tokens cannot be forgotten, short of all."""

    def append(self, tokens: Tensor, at: int | Tensor) -> None:
        """Store tokens [B, H, m, d], the first of them at position ``at``."""

    def parts(self) -> Iterator[Tensor]:
        """All tokens in order, [B, H, _, d] at a time, in the dtype that they came in."""

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held."""


class Growing:
    """A buffer that grows by 1/128 of its length: at most 0.8 % of it is waste, and an appended token copies about 128
    tokens' worth of it in the mean, instead of all of it.
    """

    fixed = 0

    def __init__(self, like: Tensor) -> None:
        self.buffer = like.new_empty(*like.shape[:2], 0, *like.shape[3:])
        self.length = 0

    def append(self, tokens: Tensor, at: int | Tensor) -> None:
        self.buffer = _append(self.buffer, int(at), tokens)
        self.length = int(at) + tokens.shape[2]

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :, : self.length]

    def parts(self) -> Iterator[Tensor]:
        yield self.tokens

    def crop(self, tokens: int) -> None:
        self.length = tokens

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffer = change(self.buffer)


class Preallocated:
    """A buffer of fixed size, written in place; columns past the last token hold zeros or what was cropped."""

    fixed = 0

    def __init__(self, like: Tensor, capacity: int) -> None:
        self.tokens = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.tokens)

    def append(self, tokens: Tensor, at: int | Tensor) -> None:
        positions = at + torch.arange(tokens.shape[2], device=tokens.device)
        self.tokens.index_copy_(2, positions, tokens)

    def parts(self) -> Iterator[Tensor]:
        yield self.tokens

    def crop(self, tokens: int) -> None:
        pass  # attention masks what lies past the length

    def tensors(self) -> list[Tensor]:
        return [self.tokens]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens = change(self.tokens)


class Integers:
    """Old tokens as packed integers, in blocks of 32; the first and the last tokens as they came.

    First the ``head`` (padding and sinks, as they came), then the blocks, then the ``tail``. A block is packed once
    ``keep`` tokens have come after it.
    """

    def __init__(self, like: Tensor, bits: Bits, axis: Axis, keep: int) -> None:
        self.bits, self.axis, self.keep = bits, axis, keep
        self.head = self.tail = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.blocks: list[Growing] = []  # codes, scales and zeros, [B, H, blocks, ..]
        self.started = False

    def append(self, tokens: Tensor, at: int | Tensor) -> None:
        self.tail = torch.cat([self.tail, tokens], dim=2)
        if self.started:
            self.pack()

    def start(self, head: int) -> None:
        """Pack from token ``head`` on: the first tokens have come, and it is known which of them are sinks."""
        self.started = True
        self.head, self.tail = self.tail[:, :, :head].clone(), self.tail[:, :, head:]
        self.pack()

    def pack(self) -> None:
        """Pack what is old enough."""
        count = (self.tail.shape[2] - self.keep) // GROUP
        if count < 1:
            return
        old = self.tail[:, :, : count * GROUP].reshape(*self.tail.shape[:2], count, GROUP, -1)
        packed = quantise(old, self.bits, self.axis, GROUP)
        new = [packed.codes, packed.scale, packed.zero]
        self.blocks = self.blocks or [Growing(each) for each in new]
        for growing, each in zip(self.blocks, new, strict=True):
            growing.append(each, growing.length)
        self.tail = self.tail[:, :, count * GROUP :].clone()

    @property
    def packed_tokens(self) -> int:
        return GROUP * self.blocks[0].length if self.blocks else 0

    @property
    def fixed(self) -> int:
        return self.head.shape[2] + self.packed_tokens if self.blocks else 0

    @property
    def packed(self) -> Packed | None:
        """The blocks, of shape [B, H, blocks, 32, d]."""
        return self._blocks(slice(0, self.blocks[0].length)) if self.blocks else None

    def _blocks(self, part: slice) -> Packed:
        codes, scale, zero = (each.tokens[:, :, part] for each in self.blocks)
        shape = torch.Size([*codes.shape[:3], GROUP, self.tail.shape[3]])
        return Packed(codes, scale, zero, shape, self.tail.dtype, self.bits, self.axis, GROUP)

    @property
    def tokens(self) -> Tensor:
        """Those that are not packed."""
        return torch.cat([self.head, self.tail], dim=2) if self.head.shape[2] else self.tail

    def parts(self) -> Iterator[Tensor]:
        yield self.head
        for low in range(0, self.packed_tokens // GROUP, _BLOCKS):
            yield self._blocks(slice(low, low + _BLOCKS)).unpack().flatten(2, 3)
        yield self.tail

    def crop(self, tokens: int) -> None:
        held = tokens - self.packed_tokens - self.head.shape[2]
        if held < 0:  # only while nothing is packed: start again
            self.tail, self.head, self.started = self.head[:, :, :tokens], self.tail[:, :, :0], False
        else:
            self.tail = self.tail[:, :, :held]

    def tensors(self) -> list[Tensor]:
        return [self.head, self.tail, *(each.buffer for each in self.blocks)]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.head, self.tail = change(self.head), change(self.tail)
        for block in self.blocks:
            block.each(change)


def _append(buffer: Tensor, length: int, new: Tensor) -> Tensor:
    """``buffer`` [B, H, capacity, ..] with ``new`` [B, H, n, ..] written from ``length`` on, grown if it must."""
    end = length + new.shape[2]
    # Autograd and inference mode forbid writing into what they have seen: then every update copies.
    frozen = torch.is_grad_enabled() or (buffer.is_inference() and not torch.is_inference_mode_enabled())
    if end > buffer.shape[2] or (frozen and length):
        capacity = end if length == 0 else end + end // 128
        grown = buffer.new_empty(*buffer.shape[:2], capacity, *buffer.shape[3:])
        grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[:, :, length:end] = new
    return buffer
