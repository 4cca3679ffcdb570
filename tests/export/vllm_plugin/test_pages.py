"""What lies where in vLLM's pages."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from grace_opt import KVMask
from grace_opt.export.vllm_plugin.pages import BLOCKS, block_sizes, layout

HEADS, N, LAYERS = 3, 16, 4


def mask(*widths: int) -> KVMask:
    """Keys of layers 0 and 2 with these widths, a head each; values of layer 2."""
    keeps = {layer: [np.arange(width) for width in widths] for layer in (0, 2)}
    return KVMask.of_channels("tiny", HEADS, N, keeps, {2: keeps[2]}, num_hidden_layers=LAYERS)


@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 7, 4), (1, 5, 16), (0, 8, 8)])
def test_every_number_of_a_token_has_one_place(widths: tuple[int, ...]) -> None:
    plan = mask(*widths).plan
    found = layout(plan, LAYERS, range(HEADS), N)
    assert len(found.layers) == LAYERS
    for total, kind in ((found.rows, "rows"), (found.residuals, "residuals")):
        places = [place for parts in found.layers for part in parts for place in getattr(part, kind)]
        spans = sorted((place.offset, place.end) for place in places if place.heads * place.width)
        assert spans[0][0] == 0
        assert spans[-1][1] == total
        assert all(end == begins for (_, end), (begins, _) in pairwise(spans))
    assert found.rows == 3 * sum(widths) + (2 * LAYERS - 3) * HEADS * N
    assert found.rows + found.residuals == 2 * LAYERS * HEADS * N
    for parts in found.layers:
        assert sorted(head for part in parts for head in part.heads) == list(range(HEADS))


def test_some_heads_of_a_model_are_laid_out_as_they_are_numbered_there() -> None:
    found = layout(mask(4, 7, 9).plan, LAYERS, [1, 2], N)
    parts = found.layers[0]
    assert [(part.heads, part.codecs[0].width) for part in parts] == [((0,), 7), ((1,), 9)]


def test_a_place_is_a_view_of_its_numbers_and_of_no_others() -> None:
    found = layout(mask(4, 7, 4).plan, LAYERS, range(HEADS), N)
    block, pages = 8, torch.zeros(5, 8 * found.rows + 3)
    for parts in found.layers:
        for part in parts:
            for place in part.rows:
                view = place.of(pages, block)
                assert view.shape == (5, block, len(part.heads), place.width)
                view += 1
    assert torch.equal(pages[:, : 8 * found.rows], torch.ones(5, 8 * found.rows))
    assert not pages[:, 8 * found.rows :].any()


@pytest.mark.parametrize(("rows", "residuals"), [(500, 500), (250, 750), (100, 900), (900, 100), (333, 667), (1000, 0)])
def test_a_long_request_wastes_little_of_its_blocks(rows: int, residuals: int) -> None:
    window = 256
    first, second = block_sizes(rows, residuals, window)
    assert first in BLOCKS
    assert second in BLOCKS
    assert math.lcm(first, second) <= 256
    page = max(first * rows, second * residuals)
    held = page * (math.ceil(4096 / first) + math.ceil(window / second) + 1)
    assert held <= 1.2 * (4096 * rows + window * residuals) + 2 * page


def test_half_of_all_channels_fills_its_blocks_to_the_last_number() -> None:
    first, second = block_sizes(96, 96, 260)
    assert first == second
