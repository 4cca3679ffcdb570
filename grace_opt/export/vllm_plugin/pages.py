"""What lies where in vLLM's pages: the rows of all tokens in one cache, the residuals of whole tokens in another.

vLLM hands out blocks of one size in bytes. A block of the first cache holds the rows of ``rows_block`` tokens in all
layers, one of the second the residuals of ``residuals_block`` tokens; both numbers are chosen so that the two fill it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from grace_opt.compression.codec import Codec, Whole, stacked
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.heads import KINDS

BLOCKS = range(16, 257, 8)  #: tokens of a block
_TOKENS = 4096  # of a request, for which the block sizes are chosen


@dataclass(frozen=True)
class Place:
    """Where some heads' numbers of a token lie among all numbers of the token: from ``offset`` on."""

    offset: int
    heads: int
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.heads * self.width

    def of(self, pages: Tensor, block: int) -> Tensor:
        """The part [B, block, heads, width] of pages [B, >= block * numbers of a token], as a view.

        A head's numbers of all tokens of a block lie side by side, as the kernel for CPUs reads them.
        """
        part = pages[:, block * self.offset : block * self.end]
        return part.view(len(pages), self.heads, block, self.width).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Part:
    """KV heads of a layer whose codecs have one signature.

    ``heads``: their numbers among the heads held here. ``codecs``: of keys and of values, tensors [heads, ..].
    ``rows``, ``residuals``: the places of keys and of values in the two caches.
    """

    heads: tuple[int, ...]
    codecs: tuple[Codec, Codec]
    rows: tuple[Place, Place]
    residuals: tuple[Place, Place]

    def to(self, like: Tensor) -> Part:
        """With its codecs on the device and in the dtype of ``like``."""
        key, value = (codec.to(like) for codec in self.codecs)
        return replace(self, codecs=(key, value))


@dataclass(frozen=True, eq=False)
class Layout:
    """All layers' parts, and how many numbers a token has in each of the two caches."""

    layers: tuple[tuple[Part, ...], ...]
    rows: int
    residuals: int


def layout(plan: CachePlan, layers: int, heads: Sequence[int], n: int) -> Layout:
    """The layout of some KV heads, with n channels each, of all layers; layers that the plan leaves out are whole."""
    found, rows, residuals = [], 0, 0
    for index in range(layers):
        parts = []
        for codecs, local in _alike(plan.layers.get(index), heads, n):
            widths = [(codec.width, codec.residual_width) for codec in codecs]
            places = []
            for width, rest in widths:
                places.append((Place(rows, len(local), width), Place(residuals, len(local), rest)))
                rows, residuals = places[-1][0].end, places[-1][1].end
            (key, key_rest), (value, value_rest) = places
            parts.append(Part(local, codecs, (key, value), (key_rest, value_rest)))
        found.append(tuple(parts))
    return Layout(tuple(found), rows, residuals)


def _alike(plan: LayerPlan | None, heads: Sequence[int], n: int) -> list[tuple[tuple[Codec, Codec], tuple[int, ...]]]:
    """Heads of one signature together: their stacked codecs of keys and of values, and their places in ``heads``."""
    groups: dict[object, list[tuple[int, tuple[Codec, ...]]]] = {}
    for local, head in enumerate(heads):
        given = [plan.codecs.get(kind) if plan is not None else None for kind in KINDS]
        codecs = tuple((Whole() if each is None else each[head]).sized(n) for each in given)
        groups.setdefault(tuple(codec.signature() for codec in codecs), []).append((local, codecs))
    found = []
    for members in groups.values():
        key, value = (stacked([codecs[side] for _, codecs in members]) for side in (0, 1))
        found.append(((key, value), tuple(local for local, _ in members)))
    return found


def block_sizes(rows: int, residuals: int, window: int) -> tuple[int, int]:
    """Tokens of a block of rows and of residuals: those that hold a long request in the fewest bytes.

    ``rows``, ``residuals``: numbers of a token; ``window``: how many of the last tokens hold residuals. Prefixes are
    found again in steps of the least common multiple, which is at most that of the largest block.
    """

    def cost(sizes: tuple[int, int]) -> tuple[int, int, int]:
        page = max(sizes[0] * rows, sizes[1] * residuals)
        blocks = math.ceil(_TOKENS / sizes[0]) + math.ceil(window / sizes[1]) + 1
        return page * blocks, math.lcm(*sizes), sizes[0]

    pairs = [(first, second) for first in BLOCKS for second in BLOCKS if math.lcm(first, second) <= BLOCKS[-1]]
    return min(pairs, key=cost)
