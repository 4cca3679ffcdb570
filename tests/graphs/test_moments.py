"""Sums over tokens under weights, against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from grace_opt.graphs import moments
from grace_opt.graphs.moments import weighted_sums


@pytest.mark.parametrize("tokens", [1, 64, 200])  # one block, several, and a last one that is shorter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_the_definition(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BLOCK", 1)
    rng = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(2, tokens, 5, generator=rng, dtype=dtype)
    weights = torch.rand(2, 3, tokens, generator=rng, dtype=dtype)
    weights[:, 1, ::2] = 0
    about = x.mean(1, keepdim=True)
    first, second = weighted_sums(x.mT.contiguous().mT, weights, about)
    assert first.dtype == second.dtype == dtype
    y, w = (x - about).double(), weights.double()
    torch.testing.assert_close(first.double(), torch.einsum("hat,hti->hai", w, y), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(second.double(), torch.einsum("hat,hti,htj->haij", w, y, y), rtol=1e-5, atol=1e-4)
