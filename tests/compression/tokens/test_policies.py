"""Every token policy passes the kit, and what each promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from grace_opt import InputError
from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.base import Tier, TokenPolicy, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.graphs.observed import Observed
from grace_opt.testing.policies import check_policy
from tests.support.observed import observed_layers


@dataclass(frozen=True)
class Everything(TokenPolicy):
    """Wrong: never drops any."""

    name: ClassVar[str] = "streaming"

    def tiers(self, seen: Observed, share: float) -> Tensor:
        return torch.ones(seen.keys.shape[1], dtype=torch.int8)


def test_streaming_keeps_the_last() -> None:
    check_policy(Streaming())
    seen = observed_layers(0)[0]
    old = seen.prunable
    tiers = Streaming().tiers(seen, 0.5)
    dropped = (tiers == Tier.DROPPED).nonzero()[:, 0].tolist()
    stay = round(0.5 * (old.stop - old.start))
    assert dropped == list(range(old.start, old.stop - stay))
    assert not (tiers == Tier.COMPRESSED).any()


def test_the_kit_finds_a_policy_that_keeps_too_many() -> None:
    with pytest.raises(AssertionError, match="come back from its parameters"):
        check_policy(Everything())
    with pytest.raises(InputError, match="did you mean 'streaming'"):
        POLICIES["steaming"]
    with pytest.raises(InputError, match="from 0 to 1"):
        TokenRule(Streaming(), 1.2)
