"""What a card has, and what of it a kernel takes: how long its tiles are, and into how many splits tokens are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

WARPS = 4  # of a program
_ON_THE_WAY = 65536  # bytes that hide the memory's latency on a multiprocessor, with room to spare
_BY_REGISTERS = 3  # programs of 4 warps and 168 registers that a multiprocessor holds
_RESERVED = 1024  # bytes of shared memory that the driver takes of each program
_MOST = 128  # splits


@dataclass(frozen=True)
class Card:
    """Multiprocessors; bytes of shared memory that one program may take, and that a multiprocessor has."""

    multiprocessors: int
    program_shared: int
    shared: int


SMALLEST = Card(1, 101376, 102400)  # of what is admitted: compute capability 8.6, 8.9 and 12.0


@cache
def card_of(device: torch.device) -> Card:
    """Of a device; the smallest one for the interpreter."""
    if device.type != "cuda":
        return SMALLEST
    found = torch.cuda.get_device_properties(device)
    program = getattr(found, "shared_memory_per_block_optin", SMALLEST.program_shared)  # older torch does not say
    return Card(found.multi_processor_count, program, found.shared_memory_per_multiprocessor)


@dataclass(frozen=True)
class Tiles:
    """So many tokens are read at a time, and ``stages - 1`` such tiles are on the way meanwhile, of ``nbytes`` each."""

    tokens: int
    stages: int
    nbytes: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program, at most: what is on the way, one tile more and 8 KiB to pass results."""
        return self.stages * self.nbytes + 8192


@cache
def tiles(row_bytes: int, program_shared: int, longest: int = 64, most: int = 3) -> Tiles | None:
    """The longest tile of rows of keys and values that this shared memory holds with ``most`` stages, or with two.

    ``row_bytes``: of the blocks that a row is padded to. None if not even 16 tokens fit.
    """
    for stages in range(most, 1, -1):
        count = longest
        while count >= 16:
            found = Tiles(count, stages, count * row_bytes)
            if found.shared <= program_shared:
                return found
            count //= 2
    return None


def resident(card: Card, each: Tiles) -> int:
    """Programs that a multiprocessor holds at a time: as its shared memory allows, but no more than hide latency."""
    held = max(1, card.shared // (each.shared + _RESERVED))
    return min(held, _BY_REGISTERS, max(2, math.ceil(_ON_THE_WAY / ((each.stages - 1) * each.nbytes))))


def splits(programs: int, tokens: int, card: Card, each: Tiles) -> int:
    """Into how many parts the tokens of each of ``programs`` heads are cut: they fill the card once, or in whole waves
    to within a tenth where heads alone are more than that. A split has four tiles at least, which fill the pipeline.
    """
    slots = card.multiprocessors * resident(card, each)
    most = max(1, min(_MOST, tokens // (4 * each.tokens)))
    return min(most, slots // programs) if programs <= slots else _even(programs, most, slots)


@cache
def _even(programs: int, most: int, slots: int) -> int:
    busy = [programs * n / (slots * math.ceil(programs * n / slots)) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(busy, 1) if share >= 0.9 * max(busy))
