"""The conformance kit of token policies (`grace_opt.compression.tokens.base`).

from grace_opt.testing.policies import check_policy
check_policy(MyPolicy(...))     # raises AssertionError, in a sentence
"""

from __future__ import annotations

import json

import torch

from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.base import Tier, TokenPolicy
from grace_opt.graphs.observed import Observed


def check_policy(policy: TokenPolicy, *, seed: int = 0) -> None:
    """Check a policy on prompts of several lengths and shares. Raises AssertionError with what is wrong."""
    assert type(policy).name in POLICIES, f"token policy {policy.name!r} is not registered; POLICIES.register it"
    made = POLICIES[policy.name](**json.loads(json.dumps(policy.parameters(), allow_nan=False)))
    assert made == policy, "a policy must come back from its parameters"
    for share in (0.0, 0.3, 1.0):
        shares = policy.layer_shares(share, 5)
        assert len(shares) == 5, "a layer must have a share each"
        assert all(0 <= each <= 1 for each in shares), f"the shares of layers must be from 0 to 1, got {shares}"
        assert abs(sum(shares) / 5 - share) < 1e-6, f"the shares of layers must be {share} on average, got {shares}"
    for tokens in (40, 61):
        seen = _seen(tokens, seed)
        before = [each.clone() for each in (seen.queries, seen.keys, seen.values)]
        old = seen.prunable.stop - seen.prunable.start
        for share in (0.0, 0.3, 0.5, 1.0):
            tiers = policy.tiers(seen, share)
            expected = (len(seen.keys), tokens) if policy.per_head else (tokens,)
            assert tuple(tiers.shape) == expected, (
                f"tiers must have an entry a token, {expected}; got {tuple(tiers.shape)}"
            )
            assert set(tiers.flatten().tolist()) <= set(map(int, Tier)), "tiers must be of Tier"
            assert torch.equal(tiers, policy.tiers(seen, share)), "the same prompt must give the same tiers"
            stay = float((tiers[..., seen.prunable] != Tier.DROPPED).float().view(-1, old).sum(1).mean())
            assert stay <= share * old + 1, f"{stay:g} of {old} old tokens stay where a share of {share} may"
        assert stay == old, "with a share of 1 no token may be dropped"
        if policy.per_head:
            _check_heads(policy, seen)
        after = (seen.queries, seen.keys, seen.values)
        assert all(map(torch.equal, before, after)), "a policy must not change what it looks at"


def _check_heads(policy: TokenPolicy, seen: Observed) -> None:
    order = torch.arange(len(seen.keys)).flip(0)
    turned, tiers = policy.tiers(seen.part(order), 0.5), policy.tiers(seen, 0.5)
    assert torch.equal(turned, tiers[order]), "heads in another order must get their own tiers in that order"


def _seen(tokens: int, seed: int) -> Observed:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return Observed(normal(6, 8, 16), normal(2, tokens, 16), normal(2, tokens, 16), 0.25, 2, 5)
