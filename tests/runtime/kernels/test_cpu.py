"""What is the CPU kernel's own (`test_kernels` has it beside the others)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_opt.runtime
from grace_opt.runtime.kernels import choose, cpu
from grace_opt.runtime.kernels.contract import Request
from tests.support import ROOT
from tests.support.families import tiny_model
from tests.support.generation import logits_of, random_mask

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


def test_what_is_compiled_in_several_processes_runs_in_one(tmp_path: Path) -> None:
    """Functions of one name, from several files of numba's cache, are linked as one: each compilation has its own."""
    script = "import sys; from tests.runtime.kernels.test_cpu import errors_of as f; print(*f(*map(int, sys.argv[1:])))"

    def started(*groups: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, groups)]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}  # which is in the names
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def errors(process: subprocess.Popen[str]) -> list[float]:
        return list(map(float, process.communicate()[0].split()))

    alone = [started(group) for group in (2, 3)]
    found = [*(errors(each) for each in alone), errors(started(2, 3))]
    assert [len(each) for each in found] == [1, 1, 2]
    assert max(map(max, found)) < 1e-3


def errors_of(*groups: int) -> list[float]:
    """For models with so many queries a KV head: how far the kernel's logits are from those of float64."""
    found = []
    for group in groups:
        size = {"hidden_size": 32 * group, "num_attention_heads": 2 * group, "num_key_value_heads": 2}
        model = tiny_model("Llama", num_hidden_layers=1, head_dim=16, **size)
        mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
        ids = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(0))
        cpu.SHORTEST = 0
        logits = []
        for each in (model, deepcopy(model).double()):
            with grace_opt.runtime.cache(mask, each) as past:
                logits.append(torch.cat(logits_of(each, past, [30] + [1] * 10, ids, torch.ones_like(ids))))
        found.append(float((logits[0].double() - logits[1]).abs().max()))
    return found
