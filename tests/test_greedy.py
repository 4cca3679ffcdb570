"""Forward greedy: on a card's tensors as on arrays, and step by step by the objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grace_opt.greedy import _on_arrays, _on_tensors, forward


@pytest.mark.parametrize("protected", [False, True])
def test_tensors_pick_what_arrays_pick(protected: bool) -> None:
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 7, 9))
    weights = half.swapaxes(1, 2) @ half
    free = rng.random((3, 9)) < 0.8 if protected else None
    masks = None if free is None else torch.from_numpy(free)
    picks, costs = _on_arrays(weights, 5, free)
    for found in (forward(torch.from_numpy(weights), 5, masks), _on_tensors(torch.from_numpy(weights), 5, masks)):
        np.testing.assert_array_equal(found[0].numpy(), picks)
        np.testing.assert_allclose(found[1].numpy(), costs, rtol=1e-12)
    for head, order in enumerate(picks):
        chosen: list[int] = []
        for step, pick in enumerate(order):
            grown = [w for w in range(9) if w not in chosen and (free is None or free[head, w])]
            errors = [weights[head][np.ix_([*chosen, w], [*chosen, w])].sum() for w in grown]
            before = weights[head][np.ix_(chosen, chosen)].sum()
            assert pick == grown[int(np.argmin(errors))]
            assert costs[head, step] == pytest.approx(min(errors) - before)
            chosen.append(int(pick))
