"""Every kernel beside the plain one in float64: the same logits, and the same tokens."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import grace_opt.runtime
from grace_opt import InputError, KVMask
from grace_opt.compression import tiles
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plan import CachePlan, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.runtime.kernels import choose, cpu, split
from grace_opt.runtime.kernels.contract import Request
from tests.support.families import tiny_model
from tests.support.generation import logits_of, prompts, random_mask, run, steps
from tests.support.slack import assert_logits, logit_slack

NAMES = [kernel.name for kernel in choose.kernels()]
# The interpreter's numpy says when a mask of float32's minimum passes to -inf, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@dataclass
class Tried:
    """A kernel by its name, the layers that it was called for, and how many tokens it is made to decode."""

    name: str
    calls: list[int]

    @property
    def tokens(self) -> int:
        return 6 if self.name == "triton" else 24  # an interpreter's are slow

    def cache(self, plan: KVMask | CachePlan, model: Any, **options: Any) -> Any:
        return grace_opt.runtime.cache(plan, model, kernel=self.name, **options)


def reference(plan: KVMask | CachePlan, wide: Any, **options: Any) -> Any:
    """The cache of a model in float64."""
    return grace_opt.runtime.cache(plan, wide, kernel="plain", **options)


@pytest.fixture(params=["plain", "cpu", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """A kernel that may read caches of any length, on a CPU."""
    assert request.param in NAMES
    found = Tried(request.param, [])
    kind = next(type(each) for each in choose.kernels() if each.name == request.param)
    attend = kind.attend

    def noted(self: Any, request: Request) -> Any:
        if request.query.dtype != torch.float64:
            found.calls.append(request.handle.layer.index)
        return attend(self, request)

    monkeypatch.setattr(cpu, "SHORTEST", 0)
    monkeypatch.setattr(split, "INTERPRETED", True)
    if request.param == "triton":
        monkeypatch.setattr(tiles, "DEVICES", {"cpu"})
    monkeypatch.setattr(kind, "attend", noted)
    return found


def test_all_are_tried() -> None:
    """So that no kernel lies untested: these are all that this machine loads."""
    assert sorted(NAMES) == ["cpu", "plain", "triton"]


@dataclass(frozen=True)
class Case:
    """What `random_mask` makes, how the cache holds it, and the model's query and KV heads."""

    kept: int | None = 7
    values: int | None = 9
    recent_window: int = 4
    sinks: int = 2
    readout: str = "static"
    generated: str = "prune"
    ragged: bool = False
    static: bool = False
    group: int = 2


CASES = [
    Case(),
    Case(recent_window=0, sinks=0),
    Case(recent_window=0, sinks=3, readout="none"),
    Case(recent_window=500, sinks=3),
    Case(recent_window=40, sinks=0, ragged=True),
    Case(generated="keep", ragged=True),
    Case(generated="keep", recent_window=10, sinks=0),
    Case(static=True),
    Case(static=True, generated="keep", readout="prefill"),
    Case(static=True, recent_window=500),
    Case(values=None),
    Case(kept=None, values=5, readout="prefill"),
    Case(kept=1, values=16),
    Case(kept=16, values=1, readout="none"),
    Case(group=1),
    Case(group=3),
    Case(group=4, kept=3),
    Case(group=7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generation_is_the_same(kernel: Tried, case: Case) -> None:
    """Padded rows, grouped queries; so many tokens that windows wrap and rows leave them."""
    size = {"hidden_size": 32 * case.group, "num_attention_heads": 2 * case.group, "num_key_value_heads": 2}
    model = tiny_model("Llama", num_hidden_layers=1, head_dim=16, **size)
    given = {name: value for name, value in vars(case).items() if name not in ("kept", "static", "group")}
    mask = random_mask(model, case.kept, **given)
    options: dict[str, Any] = {"max_length": 60} if case.static else {}
    wide = deepcopy(model).double()
    expected = run(wide, reference(mask, wide, **options), kernel.tokens)
    assert not kernel.calls
    found = run(model, kernel.cache(mask, model, **options), kernel.tokens)
    for ours, theirs in steps(found, expected, 1e-3):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-3, rtol=0)
    assert len(kernel.calls) == (kernel.tokens - 1) * (2 if case.ragged else 1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (2, 8), (8, 2), (4, 0), (0, 4)])
def test_integers(kernel: Tried, key_bits: int, value_bits: int, static: bool) -> None:
    """Rows of a batch with blocks, with fewer, and with none; blocks are packed as tokens come."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=6, sinks=2, readout="static")
    tokens = 40 if kernel.name != "triton" else 10
    ids = torch.randint(3, 99, (4, 130), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    for row, padding in enumerate((0, 6, 50, 84)):
        attended[row, :padding] = 0
    bits: dict[str, Any] = {"key_bits": key_bits, "value_bits": value_bits}
    bits |= {"max_length": 140} if static else {}
    wide, chunks = deepcopy(model).double(), [130 - tokens] + [1] * tokens
    expected = logits_of(wide, reference(mask, wide, **bits), chunks, ids, attended)
    if kernel.name == "triton":  # which reads them in 16 bits
        with pytest.raises(InputError, match="kernel 'triton' cannot read layer 0: it (unpacks|reads) integers of"):
            logits_of(model, kernel.cache(mask, model, **bits), chunks, ids, attended)
        return
    found = logits_of(model, kernel.cache(mask, model, **bits), chunks, ids, attended)
    assert len(kernel.calls) == tokens
    for ours, theirs in zip(found, expected, strict=True):
        assert_logits(ours.double(), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 4])
def test_sixteen_bits(kernel: Tried, dtype: torch.dtype, bits: int) -> None:
    """As near to float64, on average, as a model in 16 bits is; a kernel that is wrong is off by all of a logit."""
    model = tiny_model("Llama", num_hidden_layers=1).to(dtype)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 90), generator=torch.Generator().manual_seed(0))
    tokens, chunks = torch.ones_like(ids), [84] + [1] * 6
    wide = deepcopy(model).double()
    options = {"key_bits": bits, "value_bits": bits}
    expected = torch.cat(logits_of(wide, reference(mask, wide, **options), chunks, ids, tokens))
    past = kernel.cache(mask, model, **options)
    found = torch.cat(logits_of(model, past, chunks, ids, tokens))
    assert len(kernel.calls) == 6
    assert bits or past.layers[0].key_side.buffer.tensors()[0].stride(2) % 8 == 0
    assert expected.std() > 1
    assert (found.double() - expected).abs().mean() < (0.03 if dtype == torch.float16 else 0.2)


@pytest.mark.parametrize("codec", ["lowrank", "streaming"])
def test_other_codecs_and_policies(kernel: Tried, codec: str) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    (layer,) = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static").plan
    basis = LowRank(torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(9))
    changes = {
        "lowrank": {"codecs": {kind: [basis, basis] for kind in layer.codecs}},
        "streaming": {"codecs": {}, "tokens": TokenRule(Streaming(), 0.5)},
    }
    plan = CachePlan({0: replace(layer, **changes[codec])})
    wide = deepcopy(model).double()
    expected = run(wide, reference(plan, wide), kernel.tokens)
    found = run(model, kernel.cache(plan, model), kernel.tokens)
    for ours, theirs in steps(found, expected, logit_slack(expected.logits)):
        assert_logits(ours.double(), theirs.double())
    assert len(kernel.calls) == kernel.tokens - 1


def test_beams_crops_and_chunks(kernel: Tried) -> None:
    """What a kernel stored is read by others, and what they stored by it."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=8, sinks=2, readout="static")
    wide = deepcopy(model).double()
    ids = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(0))
    found = []
    for past, each in ((reference(mask, wide), wide), (kernel.cache(mask, model), model)):
        logits = []
        for chunks in ([30, 1, 1, 1], [7, 1, 1], [1, 3, 1]):
            logits += logits_of(each, past, chunks, ids, torch.ones_like(ids))
            past.crop(-2)
        past.reorder_cache(torch.tensor([1, 0]))
        logits += logits_of(each, past, [1, 1], ids, torch.ones_like(ids))
        found.append(logits)
    chunked = 2 if kernel.name == "plain" else 0  # others leave several tokens at a time to it
    assert len(kernel.calls) == 3 + 2 + 2 + 2 + chunked
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_logits(ours.double(), theirs)
    pasts = (reference(mask, wide), kernel.cache(mask, model))
    beams = [
        run(each, past, kernel.tokens, num_beams=3).sequences for past, each in zip(pasts, (wide, model), strict=True)
    ]
    assert torch.equal(*beams)


def test_tokens_are_equal_between_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the two best logits are further apart than rounding."""
    monkeypatch.setattr(cpu, "SHORTEST", 0)
    monkeypatch.setattr(split, "INTERPRETED", True)
    model = tiny_model("Llama")
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    found = [run(model, grace_opt.runtime.cache(mask, model, kernel=name), 8) for name in NAMES]
    for each in found[1:]:
        for ours, theirs in steps(each, found[0], 1e-3):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert torch.equal(found[0].sequences[:, : prompts()[0].shape[1]], prompts()[0])
