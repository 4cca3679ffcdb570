"""Each policy's scores against its formula, term by term, and budgets against hand tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_opt import InputError
from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, method
from grace_opt.compression.plugins import POLICIES
from grace_opt.compression.tokens import scores as module
from grace_opt.compression.tokens.base import Tier, policy_named
from grace_opt.compression.tokens.scores import highest, received
from grace_opt.graphs.observed import Observed
from grace_opt.testing.policies import check_policy
from tests.support.observed import LAYERS, observed_layers

HEADS, GROUP, WINDOW, TOKENS = (LAYERS[name] for name in ("heads", "group", "window", "tokens"))


def attention(seen: Observed) -> list[list[list[float]]]:
    """[Hq][w][T], one number at a time."""
    found = []
    for q in range(HEADS * GROUP):
        rows = []
        for i in range(WINDOW):
            at = TOKENS - WINDOW + i
            logits = [
                float(seen.queries[q, i].double() @ seen.keys[q // GROUP, t].double()) * seen.scaling
                for t in range(at + 1)
            ]
            top = max(logits)
            total = sum(math.exp(each - top) for each in logits)
            rows.append([math.exp(each - top) / total for each in logits] + [0.0] * (TOKENS - 1 - at))
        found.append(rows)
    return found


@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_received_is_the_column_sums_of_causal_attention(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    seen = observed_layers(2)[1]
    brute = torch.tensor(attention(seen))
    torch.testing.assert_close(received(seen), brute.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received(seen, 2), brute[:, -2:].sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received(seen).sum(1), torch.full((HEADS * GROUP,), float(WINDOW)))


def by_formula(name: str, seen: Observed) -> list[list[float]]:
    """[H][old], from the definitions."""
    p, old = attention(seen), range(seen.sinks, TOKENS - seen.recent_window)
    of = [range(h * GROUP, (h + 1) * GROUP) for h in range(HEADS)]
    column = [[sum(row[t] for row in of_head) for t in range(TOKENS)] for of_head in p]

    def pooled(q: int, t: int) -> float:
        return max(column[q][s] for s in range(t - 3, t + 4) if s in old)

    if name in ("snapkv", "pyramidkv", "adakv"):
        return [[sum(pooled(q, t) for q in group) / GROUP for t in old] for group in of]
    if name == "h2o":
        return [[sum(column[q][t] for q in group) / GROUP for t in old] for group in of]
    if name == "tova":
        return [[sum(of_head[-1][t] for of_head in p) / len(p) for t in old]]
    keys, values = seen.keys.double(), seen.values.double()
    if name == "knorm":
        return [[-math.sqrt(float(keys[h, t] @ keys[h, t])) for t in old] for h in range(HEADS)]
    if name == "keydiff":
        unit = keys / keys.norm(dim=-1, keepdim=True)
        mean = [sum(unit[h]) / TOKENS for h in range(HEADS)]
        return [[-float(unit[h, t] @ mean[h] / mean[h].norm()) for t in old] for h in range(HEADS)]
    found = []
    for h in range(HEADS):
        shares = torch.zeros(len(old), dtype=torch.float64)
        for q in of[h]:
            asked = seen.queries[q].double()
            mu, cov = asked.mean(0), asked.T.cov(correction=0)
            z = [
                float(seen.scaling * keys[h, t] @ mu + seen.scaling**2 * keys[h, t] @ cov @ keys[h, t] / 2) for t in old
            ]
            shares += torch.tensor(z, dtype=torch.float64).softmax(0) / GROUP
        found.append([float(s * values[h, t].norm()) for s, t in zip(shares, old, strict=True)])
    return found


SCORED = ["snapkv", "pyramidkv", "adakv", "h2o", "tova", "knorm", "keydiff", "expected-attention"]


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_the_formula(name: str) -> None:
    seen = observed_layers(1)[0]
    policy: Any = POLICIES[name]()
    expected = torch.tensor(by_formula(name, seen))
    torch.testing.assert_close(policy.scores(seen), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*SCORED, "streaming"])
def test_every_policy_passes_the_kit(name: str) -> None:
    check_policy(POLICIES[name]())
    check_policy(policy_named(name, POLICIES[name]().parameters()))


def kept(tiers: Tensor, seen: Observed) -> list[int]:
    old = tiers.view(-1, TOKENS)[:, seen.prunable]
    return (old != Tier.DROPPED).sum(1).tolist()


def test_heads_hold_equally_many_but_under_adakv() -> None:
    seen = observed_layers(3)[2]
    for name in SCORED:
        counts = kept(POLICIES[name]().tiers(seen, 0.4), seen)
        assert sum(counts) == len(counts) * 26, name  # .4 of 65
        assert (len(set(counts)) > 1) == (name == "adakv"), name
        if name == "adakv":
            assert min(counts) >= 5  # a fifth of 26


def test_adakv_keeps_the_most_mass_and_its_floor() -> None:
    seen = observed_layers(3)[2]
    scores = POLICIES["snapkv"]().scores(seen)  # type: ignore[attr-defined]

    def mass(name: str, **options: Any) -> float:
        stay = POLICIES[name](**options).tiers(seen, 0.3)[:, seen.prunable] != Tier.DROPPED
        return float(scores[stay].sum())

    assert mass("adakv", floor=0.0) >= mass("adakv") >= mass("snapkv")
    assert torch.equal(POLICIES["adakv"](floor=1.0).tiers(seen, 0.3), POLICIES["snapkv"]().tiers(seen, 0.3))
    assert kept(POLICIES["adakv"](scorer="h2o").tiers(seen, 0.3), seen) != [20, 20]


def test_the_pyramid_falls_and_keeps_its_mean() -> None:
    pyramid = POLICIES["pyramidkv"]()
    assert pyramid.layer_shares(0.5, 3) == pytest.approx([0.975, 0.5, 0.025])
    assert pyramid.layer_shares(0.8, 3) == pytest.approx([1.0, 0.8, 0.6])
    assert pyramid.layer_shares(0.3, 1) == [0.3]
    assert POLICIES["pyramidkv"](beta=1.0).layer_shares(0.2, 4) == pytest.approx([0.2] * 4)
    plan = apply(METHODS["pyramidkv"], observed_layers(0), Budget(0.5, 0.5))
    assert [each.tokens.share for each in plan if each.tokens] == pytest.approx([0.975, 0.5, 0.025])


def test_half_of_what_h2o_keeps_are_the_last_tokens() -> None:
    seen = observed_layers(0)[0]
    stay = POLICIES["h2o"]().tiers(seen, 0.4)[:, seen.prunable] != Tier.DROPPED
    assert stay[:, -13:].all()
    assert POLICIES["h2o"](recent=1.0).tiers(seen, 0.4)[:, seen.prunable][:, -26:].all()


def test_equal_scores_go_to_the_first() -> None:
    assert highest(torch.tensor([[1.0, 2, 2, 1, 2]]), 2).tolist() == [[False, True, True, False, False]]


def test_compositions_are_named() -> None:
    composed = method("snapkv+grace-opt+int4", {"token_share": 0.5})
    assert (composed.tokens, composed.codec, composed.key_bits, composed.value_bits) == ("snapkv", "channels", 4, 4)
    assert composed.readout == METHODS["grace-opt"].readout
    assert method("tova+int8").codec == "whole"
    assert method("snapkv", {"token_options": "kernel:5,pooling:mean"}).token_options == {
        "kernel": "5",
        "pooling": "mean",
    }
    assert policy_named("snapkv", {"kernel": "5"}) == POLICIES["snapkv"](kernel=5)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("snapkv+tova", {}, "not composed in order; name at most one"),
        ("int4+int8", {}, "not composed in order"),
        ("grace-opt+snapkv", {}, "not composed in order"),
        ("snapkv+", {}, "unknown method ''"),
        ("snapkv+grase", {}, "did you mean 'grace'"),
    ],
)
def test_wrong_names_are_a_sentence(name: str, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        method(name, overrides)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("snapkv", {"kernel": 4}, "kernel of snapkv must be odd"),
        ("snapkv", {"kernel": "many"}, "'snapkv', option 'kernel'"),
        ("snapkv", {"kernle": 5}, "did you mean 'kernel'"),
        ("snapkv", {"pooling": "sum"}, "option 'pooling'"),
        ("pyramidkv", {"beta": 0.5}, "beta of pyramidkv must be at least 1"),
        ("adakv", {"floor": 2}, "floor of adakv must be from 0 to 1"),
        ("adakv", {"scorer": "tova"}, "adakv cannot share by 'tova'"),
        ("h2o", {"recent": -1}, "recent share of h2o"),
        ("expected-attention", {"epsilon": -1}, "must not be negative"),
    ],
)
def test_wrong_options_are_a_sentence(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        policy_named(name, options)
    chosen = method(name, {"token_options": options})
    with pytest.raises(InputError, match=words):
        apply(chosen, observed_layers(0), Budget(0.5, 0.5))
