"""Attention of decoded tokens on a CPU: our compiled kernel (`grace_opt.runtime.kernels.cpu`) over vLLM's blocks.

The kernel reads tokens in segments, each at an address of its own; a block of a request is one, or a few where the
recent window or the sinks begin or end in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_opt.compression.method import Windows
from grace_opt.export.vllm_plugin.pages import Part, Place
from grace_opt.runtime.kernels.cpu import missing
from grace_opt.runtime.kernels.cpu_program import FORMATS, Program

Whole = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Stretches:
    """Where the tokens of some requests lie, cut wherever a block, the sinks or the window begins or ends.

    int64[requests, _] each; ``tokens`` is 0 where a request has fewer. ``block`` and ``inside``: where a stretch begins
    in the cache of rows, and in that of residuals, for ``whole`` ones.
    """

    tokens: Whole
    whole: NDArray[np.bool_]
    block: tuple[Whole, Whole]
    inside: tuple[Whole, Whole]

    @classmethod
    def of(
        cls, lengths: Sequence[int], tables: tuple[Whole, Whole], blocks: tuple[int, int], windows: Windows
    ) -> Stretches:
        """Of requests with so many tokens, whose last one asks. ``tables`` int64[requests, _]: their blocks in the two
        caches; ``blocks``: tokens of a block.
        """
        cut = [_cuts(length, blocks, windows) for length in lengths]
        size = max(map(len, cut)) - 1
        starts, tokens = (np.zeros((len(cut), size), np.int64) for _ in range(2))
        for request, each in enumerate(cut):
            starts[request, : len(each) - 1] = each[:-1]
            tokens[request, : len(each) - 1] = np.diff(each)
        start = np.asarray(lengths)[:, None] - windows.recent_window
        whole = (starts < windows.sinks) | (starts >= start)
        where = [np.take_along_axis(table, starts // block, 1) for table, block in zip(tables, blocks, strict=True)]
        inside = [starts % block for block in blocks]
        return cls(tokens, whole, (where[0], where[1]), (inside[0], inside[1]))


def _cuts(length: int, blocks: tuple[int, int], windows: Windows) -> Whole:
    """Where stretches begin, and the length."""
    start, first = max(0, length - windows.recent_window), min(windows.sinks, length)
    late, early = np.arange(start // blocks[1] + 1, -(-length // blocks[1])), np.arange(-(-first // blocks[1]))
    edges = np.array([start, first, length])
    return np.unique(
        np.concatenate([np.arange(0, length, blocks[0]), blocks[1] * early, blocks[1] * late, edges]).clip(0, length)
    )


class Decoder:
    """The kernel for a part of a layer. ``group``: query heads for each KV head."""

    def __init__(self, part: Part, group: int, dtype: torch.dtype) -> None:
        self.part, self.heads, self.group = part, len(part.heads), group
        codecs = [codec.mapped(lambda tensor: tensor[None]) for codec in part.codecs]  # one for all rows of a batch
        self.program = Program(codecs, self.heads, group, dtype)

    def attend(
        self, query: Tensor, pages: Sequence[Tensor], blocks: Sequence[int], at: Stretches, scaling: float
    ) -> Tensor:
        """Outputs [requests, heads, G, Dv] of one query [requests, heads, G, D] a request.

        pages [_, numbers of a block] and tokens of a block, of the caches of rows and of residuals.
        """
        from grace_opt.runtime.kernels.decode import SEGMENT

        segments = np.zeros(at.tokens.shape, SEGMENT)
        segments["tokens"] = at.tokens
        for name, row, rest in zip(("key", "value"), self.part.rows, self.part.residuals, strict=True):
            address, head = _addresses(pages[0], row, blocks[0], at.block[0], at.inside[0])
            segments[f"{name}s"], segments[f"{name}s_head"], segments[f"{name}s_row"] = address, head, row.width
            if rest.width:
                address, head = _addresses(pages[1], rest, blocks[1], at.block[1], at.inside[1])
                segments[f"{name}_rest"], segments[f"{name}_rest_head"] = np.where(at.whole, address, 0), head
        found = segments.ctypes.data, at.tokens.shape[1]
        out = self.program.attend(query.flatten(1, 2)[:, :, None], found, int(at.tokens.sum(1).max()), scaling)
        return out.view(len(query), self.heads, self.group, -1)


def _addresses(pages: Tensor, place: Place, block: int, where: Whole, inside: Whole) -> tuple[Whole, int]:
    """Of the first head's numbers of a token, and how many bytes further those of the next head are."""
    numbers = where * pages.stride(0) + block * place.offset + inside * place.width
    return pages.data_ptr() + pages.element_size() * numbers, pages.element_size() * block * place.width


def decodes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel runs here."""
    return device.type == "cpu" and dtype in FORMATS and missing() is None
