"""A share of the bytes split between tokens and channels, where the estimated error is least."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grace_opt import InputError
from grace_opt.compression.apply import apply, online, split
from grace_opt.compression.budget import Budget, ShareError
from grace_opt.compression.method import METHODS, method
from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens.base import Tier, TokenRule
from grace_opt.compression.tokens.scores import mass_lost, received
from grace_opt.evaluate.capture import Captured, capture
from grace_opt.evaluate.replay import replay
from grace_opt.runtime.cache import cache_nbytes
from tests.support.families import tiny_model
from tests.support.observed import observed_layers

IDS = torch.randint(3, 99, (600,), generator=torch.Generator().manual_seed(5)).tolist()
SMALL: dict[str, Any] = {"recent_window": 16, "observation_window": 16}


@pytest.fixture(scope="module")
def captured() -> Captured:
    with torch.inference_mode():
        return capture(tiny_model("Llama", max_position_embeddings=1024), IDS, 600, 16)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "tova"])
def test_mass_lost_is_the_attention_on_what_is_dropped(name: str) -> None:
    seen = observed_layers(2)[1]
    policy = POLICIES[name]()
    tiers = policy.tiers(seen, 0.4).expand(2, -1)
    lost = mass_lost(TokenRule(policy, 0.4), seen)
    mass = received(seen) / seen.queries.shape[1]
    for q in range(len(seen.queries)):
        dropped = [t for t in range(*seen.prunable.indices(70)) if tiers[q // 3, t] == Tier.DROPPED]
        assert float(lost[q]) == pytest.approx(float(mass[q, dropped].sum()), rel=1e-5)
    assert not mass_lost(TokenRule(policy, 1.0), seen).any()


@pytest.mark.parametrize("share", [0.6, 0.35])
@pytest.mark.parametrize("name", ["snapkv+grace-opt", "adakv+grace-opt+int8", "tova+grace-opt"])
def test_a_split_share_is_what_the_cache_holds(captured: Captured, name: str, share: float) -> None:
    composed = method(name, SMALL)
    plan = apply(composed, captured.observed(16, composed.windows, 2), Budget(share=share))
    with torch.inference_mode(), replay(captured, plan) as past:
        assert cache_nbytes(past) / cache_nbytes(captured.past) <= share
    rules = [each.tokens for each in plan]
    assert all(rule is not None and rule.policy.name == composed.tokens for rule in rules)


def test_weights_move_the_split_from_tokens_to_channels(captured: Captured) -> None:
    found = []
    for weight in (0.0, 5.0, 1e6):
        composed = method("snapkv+grace-opt", {**SMALL, "token_weight": weight})
        chosen = split(composed, captured.observed(16, composed.windows, 2), Budget(share=0.6))
        found.append(chosen.token_share)
    assert None not in found
    few, some, many = found
    assert few is not None
    assert some is not None
    assert many is not None
    assert few <= some <= many
    assert few < many


def test_what_cannot_be_split_is_a_sentence(captured: Captured) -> None:
    layers = captured.observed(16, method("snapkv", SMALL).windows, 2)
    for name, budget, words in (
        ("snapkv+grace-opt", Budget(0.5, 0.5), "only a share of the bytes can be split .* give --budget-share"),
        ("snapkv+grace-opt", Budget(bytes_per_token=90), "only a share of the bytes can be split"),
        ("snapkv+think", Budget(share=0.5), "known of channels chosen by the attention objective; give token_share"),
        ("tova+svd", Budget(share=0.5), "'tova' and the codec 'lowrank' by the error that each makes"),
    ):
        with pytest.raises(InputError, match=words):
            apply(method(name, SMALL), layers, budget)
    with pytest.raises(InputError, match="only a share of the bytes can be split"):
        online(method("snapkv+grace-opt"), [0, 1], Budget(0.5))
    with pytest.raises(ShareError, match="raise the share"):
        apply(method("snapkv+grace-opt", SMALL), layers, Budget(share=0.01))
    assert not METHODS["snapkv"].splits
    assert not method("snapkv+grace-opt", {"token_share": 0.5}).splits
