"""How the tokens of a layer are cut for a card."""

from __future__ import annotations

import pytest

from grace_opt.runtime.kernels.triton_card import SMALLEST, Card, resident, splits, tiles

H100 = Card(132, 232448, 233472)


def test_tiles_follow_the_shared_memory() -> None:
    """As many tokens as fit with three stages: fewer on smaller cards, and none of rows that are too wide."""
    row = 2 * (256 + 256)
    large, small = tiles(row, H100.program_shared), tiles(row, SMALLEST.program_shared)
    assert large is not None
    assert small is not None
    assert (large.tokens, large.stages) == (64, 3)
    assert (small.tokens, small.stages) == (16, 3)
    assert small.shared <= SMALLEST.program_shared < large.shared
    assert tiles(8192, SMALLEST.program_shared) is None


@pytest.mark.parametrize("programs", [1, 8, 100, 128, 132, 300, 2048])
@pytest.mark.parametrize("tokens", [100, 4096, 32768])
def test_splits_fill_the_card(programs: int, tokens: int) -> None:
    """In one wave, or in whole ones to within a tenth of what is possible; never shorter than four tiles."""
    tile = tiles(2 * 128, H100.program_shared)
    assert tile is not None
    slots = H100.multiprocessors * resident(H100, tile)
    count = splits(programs, tokens, H100, tile)
    most = max(1, tokens // (4 * tile.tokens))
    assert 1 <= count <= min(most, 128)
    if programs <= slots:
        assert count == min(most, 128, slots // programs)
    else:
        busy = [programs * n / (slots * -(-programs * n // slots)) for n in range(1, min(most, 128) + 1)]
        assert busy[count - 1] >= 0.9 * max(busy)


def test_residents_hide_latency_and_no_more() -> None:
    for row in (2 * 32, 2 * 128, 2 * 512):
        tile = tiles(row, H100.program_shared)
        assert tile is not None
        count = resident(H100, tile)
        assert 1 <= count <= 3
        assert count * (tile.shared + 1024) <= H100.shared
