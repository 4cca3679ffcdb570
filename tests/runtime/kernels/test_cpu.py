"""The CPU kernel beside the plain one, which runs in float64."""

from __future__ import annotations

import logging
import threading
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import grace_opt.runtime
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plan import CachePlan, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.runtime.kernels import choose, cpu
from grace_opt.runtime.kernels.contract import Request
from tests.support.families import tiny_model
from tests.support.generation import assert_same, logits_of, random_mask, run, steps

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernel read caches of any length, and note each call."""
    found: list[int] = []
    attend = cpu.CpuKernel.attend

    def noted(self: Any, request: Request) -> Any:
        found.append(request.handle.layer.index)
        return attend(self, request)

    monkeypatch.setattr(cpu, "SHORTEST", 0)
    monkeypatch.setattr(cpu.CpuKernel, "attend", noted)
    return found


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
def test_generation_is_the_same(calls: list[int], case: Case) -> None:
    """Padded rows, grouped queries; 24 tokens, so that windows wrap and rows leave them."""
    size = {"hidden_size": 32 * case.group, "num_attention_heads": 2 * case.group, "num_key_value_heads": 2}
    model = tiny_model("Llama", head_dim=16, **size)
    given = {name: value for name, value in vars(case).items() if name not in ("kept", "static", "group")}
    mask = random_mask(model, case.kept, **given)
    options: dict[str, Any] = {"max_length": 60} if case.static else {}
    wide = deepcopy(model).double()
    expected = run(wide, grace_opt.runtime.cache(mask, wide, **options))
    assert not calls  # float64 is left to the plain kernel
    found = run(model, grace_opt.runtime.cache(mask, model, **options))
    for ours, theirs in steps(found, expected, 1e-3):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-3, rtol=0)
    assert len(calls) == 23 * len(set(calls)) * (2 if case.ragged else 1)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (2, 8), (8, 2), (4, 0), (0, 4)])
def test_integers(calls: list[int], key_bits: int, value_bits: int) -> None:
    """Rows of a batch with blocks, with fewer, and with none; blocks are packed as tokens come."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=6, sinks=2, readout="static")
    ids = torch.randint(3, 99, (4, 130), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    for row, padding in enumerate((0, 6, 50, 84)):
        attended[row, :padding] = 0
    wide, found = deepcopy(model).double(), []
    for each in (wide, model):
        past = grace_opt.runtime.cache(mask, each, key_bits=key_bits, value_bits=value_bits)
        found.append(logits_of(each, past, [90] + [1] * 40, ids, attended))
    assert len(calls) == 40
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 4])
def test_sixteen_bits(calls: list[int], dtype: torch.dtype, bits: int) -> None:
    """As near to the plain kernel as rounding allows."""
    model = tiny_model("Llama", num_hidden_layers=1).to(dtype)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 90), generator=torch.Generator().manual_seed(0))
    found = []
    for kernel in ("plain", "cpu"):
        past = grace_opt.runtime.cache(mask, model, key_bits=bits, value_bits=bits, kernel=kernel)
        found.append(torch.cat(logits_of(model, past, [80] + [1] * 10, ids, torch.ones_like(ids))))
    assert len(calls) == 10
    assert past.layers[0].key_side.buffer.tensors()[-1].stride(2) % 8 == 0 or bits
    torch.testing.assert_close(found[1], found[0], atol=5e-2 if dtype == torch.float16 else 0.4, rtol=0)


@pytest.mark.parametrize("codec", ["lowrank", "streaming"])
def test_other_codecs_and_policies(calls: list[int], codec: str) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    (layer,) = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static").plan
    basis = LowRank(torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(9))
    changes = {
        "lowrank": {"codecs": {kind: [basis, basis] for kind in layer.codecs}},
        "streaming": {"codecs": {}, "tokens": TokenRule(Streaming(), 0.5)},
    }
    plan = CachePlan({0: replace(layer, **changes[codec])})
    wide = deepcopy(model).double()
    expected = run(wide, grace_opt.runtime.cache(plan, wide))
    assert_same(run(model, grace_opt.runtime.cache(plan, model)), expected)
    assert len(calls) == 23


def test_beams_crops_and_chunks(calls: list[int]) -> None:
    """What the kernel stored is read by others, and what they stored by it."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=8, sinks=2, readout="static")
    wide = deepcopy(model).double()
    ids = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (wide, model):
        past, logits = grace_opt.runtime.cache(mask, each), []
        for chunks in ([30, 1, 1, 1], [7, 1, 1], [1, 3, 1]):
            logits += logits_of(each, past, chunks, ids, torch.ones_like(ids))
            past.crop(-2)
        past.reorder_cache(torch.tensor([1, 0]))
        logits += logits_of(each, past, [1, 1], ids, torch.ones_like(ids))
        found.append(logits)
    assert len(calls) == 3 + 2 + 2 + 2
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)
    beams = [run(each, grace_opt.runtime.cache(mask, each), num_beams=3).sequences for each in (wide, model)]
    assert torch.equal(*beams)


def test_many_tokens_are_shared_by_threads(calls: list[int]) -> None:
    """Pieces of a head are joined; threads that run models side by side keep out of each other's way."""
    model = tiny_model("Llama", num_hidden_layers=1, max_position_embeddings=4096)
    mask = random_mask(model, 7, values=9, recent_window=8, sinks=2, readout="static")
    ids = torch.randint(3, 99, (3, 3006), generator=torch.Generator().manual_seed(0))

    def logits(each: Any, row: int) -> torch.Tensor:
        past = grace_opt.runtime.cache(mask, each)
        return torch.cat(logits_of(each, past, [3000] + [1] * 6, ids[row : row + 1], torch.ones(1, 3006)))

    wide = deepcopy(model).double()
    expected = [logits(wide, row) for row in range(3)]
    found: dict[int, torch.Tensor] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=lambda row=row: found.update({row: logits(model, row)})) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        torch.testing.assert_close(found[row].double(), expected[row], atol=1e-4, rtol=0)
    assert len(calls) == 18


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2)
    ids = torch.randint(3, 99, (1, 60))

    def reason(each: Any = model, **options: Any) -> str:
        with grace_opt.runtime.cache(mask, each, **options) as past, torch.no_grad():
            each(input_ids=ids, past_key_values=past)
            return str(choose.reasons(past.layers[0])["cpu"])

    assert reason() == "True"
    assert "not float64" in reason(deepcopy(model).double())
    assert "2, 4 or 8 bits only" in reason(key_bits=3, value_bits=3)
    assert "in the memory of a CPU" in reason(offload=True)
    monkeypatch.setattr(cpu, "missing", lambda: "it needs a CPU with avx2, and this one lacks avx2")
    assert "lacks avx2" in reason()
    with pytest.raises(grace_opt.InputError, match="kernel 'cpu' cannot read layer 0: it needs .*; leave out kernel"):
        reason(kernel="cpu")
    with pytest.raises(grace_opt.InputError, match="unknown kernel 'cpus'.*did you mean 'cpu'"):
        reason(kernel="cpus")


def test_short_caches_and_gradients_are_left_to_torch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2)
    ids = torch.randint(3, 99, (1, 40))
    past = grace_opt.runtime.cache(mask, model)
    model(input_ids=ids[:, :30], past_key_values=past)
    model(input_ids=ids[:, 30:31], past_key_values=past)
    assert not calls
    monkeypatch.setattr(cpu, "SHORTEST", 33)
    with torch.no_grad():
        for at in range(31, 34):
            model(input_ids=ids[:, at : at + 1], past_key_values=past)
    assert len(calls) == 2


def test_it_is_compiled_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    """And runs where numba finds no folder to keep it in."""
    from grace_opt.runtime.kernels import decode

    monkeypatch.setattr(decode.numba.config, "CACHE_DIR", str(tmp_path / "a"))
    with caplog.at_level(logging.WARNING, "grace_opt"):
        assert decode.compiled.__wrapped__(1, "float32", 0, 0)
        assert str(tmp_path / "a") in caplog.text
        caplog.clear()
        assert decode.compiled.__wrapped__(1, "float32", 0, 0)
        assert not caplog.text

        def nowhere(function: Any) -> Any:
            raise RuntimeError("no locator available for file")

        monkeypatch.setattr(decode.caching, "FunctionCache", nowhere)
        assert decode.compiled.__wrapped__(1, "float32", 0, 0)
        assert "no folder" in caplog.text
