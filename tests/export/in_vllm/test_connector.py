"""Prompts that one process of vLLM stores and another one loads. Run by .ci/vllm."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_opt.compression.mask_file import save_mask
from grace_opt.evaluate.capture import capture
from grace_opt.export.store import KVStore
from tests.support.exports import tiny
from tests.support.generation import random_mask
from tests.support.in_vllm import BIG, in_vllm, prompts_of

BLOCK = 32
LENGTHS = (100, 130, 170, 200, 240)  # of which whole blocks are stored
STORED = tuple(length // BLOCK * BLOCK for length in LENGTHS)
SETTINGS: dict[str, Any] = {"block_size": BLOCK, "max_model_len": 400}
NEW = 12


def transfer(mask: Path, stores: Path, role: str = "kv_both", **more: Any) -> dict[str, Any]:
    config = {
        "kv_connector": "GraceOptConnector",
        "kv_connector_module_path": "grace_opt.export.vllm_plugin.connector",
        "kv_role": role,
        "kv_connector_extra_config": {"mask": str(mask), "folder": str(stores)},
    }
    return {"kv_transfer_config": config | more}


class Stored:
    """A tiny model whose prompts one process of vLLM has computed, in chunks and in one batch, and stored."""

    def __init__(self, work: Path, readout: str, bits: int) -> None:
        self.model, tokenizer = tiny(**BIG)
        self.folder, self.mask_folder, self.stores = work / "model", work / "mask", work / "stores"
        self.model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        more: dict[str, Any] = {"recent_window": 24, "sinks": 4, "ragged": True, "readout": readout}
        mask = random_mask(self.model, 20, values=16, **more)
        self.mask = replace(mask, plan=mask.plan.changed(bits={"key": bits, "value": bits})) if bits else mask
        save_mask(self.mask, self.mask_folder)
        self.store = KVStore(self.mask)
        self.prompts = prompts_of(*LENGTHS)
        told = in_vllm(
            self.folder,
            [(self.prompts, 4)],
            work,
            **SETTINGS,
            **transfer(self.mask_folder, self.stores, "kv_producer"),
        )
        assert told["batches"][0]["counts"]["vllm:external_prefix_cache_hits"] == 0
        self.paths = {self.store.verify(path.read_bytes()): path for path in self.stores.glob("*.kv")}

    def longer(self, count: int) -> list[list[int]]:
        """The prompts with so many tokens more."""
        return [ids + more for ids, more in zip(self.prompts, prompts_of(*[count] * len(LENGTHS), seed=1), strict=True)]

    def assert_loaded(self, prompts: list[list[int]], requests: list[Any]) -> None:
        """The answers are those over what was stored, and not those over the whole prompts."""
        for prompt, tokens, request in zip(prompts, STORED, requests, strict=False):
            ours = torch.tensor(request["logs"])
            wanted = self.logs_after(self.store.load(self.paths[tokens]), prompt, request["tokens"])
            torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=0)
            assert (self.logs_after(None, prompt, request["tokens"]) - wanted).abs().max() > 1e-2

    def logs_after(self, past: Any, ids: list[int], tokens: list[int]) -> torch.Tensor:
        """Log-probabilities before each token that was decoded after a prompt, by transformers over a cache."""
        known = past.get_seq_length() if past is not None else 0
        row = torch.tensor([[*ids, *tokens[:-1]][known:]])
        with torch.inference_mode():
            logits = self.model(row, past_key_values=past).logits[0]
        return logits[len(ids) - 1 - known :].log_softmax(-1)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """By integers of four bits, and read-outs that are fitted to each prompt."""
    return Stored(tmp_path_factory.mktemp("fitted"), "prefill", 4)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("static"), "static", 0)


@pytest.fixture(params=["fitted", "static"])
def stored(request: Any) -> Stored:
    found: Stored = request.getfixturevalue(request.param)
    return found


def test_the_whole_blocks_of_each_prompt_are_stored(stored: Stored) -> None:
    """As transformers' own keys and values of the prompt would be."""
    assert sorted(stored.paths) == sorted(STORED)
    for tokens, prompt in zip(STORED, stored.prompts, strict=True):
        captured = capture(stored.model, prompt, tokens, max(1, stored.store.queries))
        wanted = stored.store.decode(stored.store.encode(captured))
        for ours, theirs in zip(stored.store.decode(stored.paths[tokens].read_bytes()), wanted, strict=True):
            for one, other in zip(ours, theirs, strict=True):  # where rounding decides, codes differ by one
                off = (one - other).abs() > 1e-3 * (1 + other.abs())
                assert off.float().mean() <= (0.01 if stored.store.queries else 0)


def test_another_process_loads_them_and_computes_only_what_follows(fitted: Stored, tmp_path: Path) -> None:
    """Longer prompts in one batch, in chunks, beside one that nobody stored; then they are in vLLM's own blocks."""
    longer, fresh = fitted.longer(50), prompts_of(90, seed=2)
    config = transfer(fitted.mask_folder, fitted.stores, "kv_consumer")
    told = in_vllm(fitted.folder, [([*longer, *fresh], NEW), (longer[:1], NEW)], tmp_path, **SETTINGS, **config)
    first, again = told["batches"]
    assert first["counts"]["vllm:external_prefix_cache_hits"] == sum(STORED)
    assert again["counts"]["vllm:external_prefix_cache_hits"] == sum(STORED)
    assert again["counts"]["vllm:prefix_cache_hits"] >= STORED[0]
    fitted.assert_loaded(longer, first["requests"])
    wanted = fitted.logs_after(None, fresh[0], first["requests"][-1]["tokens"])
    torch.testing.assert_close(torch.tensor(first["requests"][-1]["logs"]), wanted, atol=1e-3, rtol=0)
    assert len(list(fitted.stores.iterdir())) == len(LENGTHS)  # a consumer stores nothing


def test_whoever_is_preempted_loads_again(static: Stored, tmp_path: Path) -> None:
    longer = static.longer(50)
    config = transfer(static.mask_folder, static.stores)
    told = in_vllm(static.folder, [(longer, 40)], tmp_path, num_gpu_blocks_override=22, **SETTINGS, **config)
    counts = told["batches"][0]["counts"]
    assert counts["vllm:num_preemptions"] > 0
    assert counts["vllm:external_prefix_cache_hits"] == sum(STORED)  # vLLM counts those of a preempted request apart
    static.assert_loaded(longer, told["batches"][0]["requests"])
    assert len(list(static.stores.iterdir())) == len(LENGTHS)  # more than half of each was stored


def test_bad_stores_are_refused_in_a_sentence_and_computed(fitted: Stored, tmp_path: Path) -> None:
    stored = fitted
    bad = tmp_path / "stores"
    bad.mkdir()
    data = {tokens: path.read_bytes() for tokens, path in stored.paths.items()}
    altered = bytearray(data[STORED[1]])
    altered[-100] ^= 1
    other = KVStore(random_mask(stored.model, 8, recent_window=8, sinks=2))
    kv = stored.store.decode(data[STORED[2]])
    written = {
        STORED[0]: data[STORED[0]][:-1],
        STORED[1]: bytes(altered),
        STORED[2]: other.encode(kv, key=stored.paths[STORED[2]].stem),
        STORED[3]: data[STORED[4]],  # of another prompt than its name says
        STORED[4]: data[STORED[4]],
    }
    for tokens, each in written.items():
        (bad / stored.paths[tokens].name).write_bytes(each)
    told = in_vllm(
        stored.folder, [(stored.prompts, NEW)], tmp_path, **SETTINGS, **transfer(stored.mask_folder, bad, "kv_consumer")
    )
    found = told["batches"][0]
    assert found["counts"]["vllm:external_prefix_cache_hits"] == STORED[4]
    for prompt, request in zip(stored.prompts[:4], found["requests"], strict=False):
        wanted = stored.logs_after(None, prompt, request["tokens"])
        torch.testing.assert_close(torch.tensor(request["logs"]), wanted, atol=1e-3, rtol=0)
    for tokens, sentence in zip(
        STORED,
        (
            "is truncated: it ends in layer 2",
            "was altered or damaged in layer 2",
            "was stored by another mask, of 'tiny'",
            "is the cache of another prompt or model than its name says",
        ),
        strict=False,
    ):
        lines = [line for line in told["said"].splitlines() if stored.paths[tokens].name in line]
        assert len(lines) == 1, lines
        assert sentence in lines[0]


def test_a_store_that_vanishes_before_it_is_read_is_computed(static: Stored, tmp_path: Path) -> None:
    stored = static
    stores = tmp_path / "stores"
    stores.mkdir()
    path = stored.paths[STORED[2]]
    (stores / path.name).write_bytes(path.read_bytes())
    told = in_vllm(
        stored.folder,
        [([stored.prompts[2]], NEW)],
        tmp_path,
        **SETTINGS,
        **transfer(
            stored.mask_folder,
            stores,
            kv_connector="Vanishing",
            kv_connector_module_path="tests.export.in_vllm.vanishing",
            kv_load_failure_policy="recompute",
        ),
    )
    request = told["batches"][0]["requests"][0]
    wanted = stored.logs_after(None, stored.prompts[2], request["tokens"])
    torch.testing.assert_close(torch.tensor(request["logs"]), wanted, atol=1e-3, rtol=0)
    assert "no such file" in told["said"]


def run(*arguments: str) -> str:
    """A Python of this environment; what it prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_long_prefix_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seventh of its bytes, loaded by a process that computes none of it, and answers that stay close."""
    graphs, mask = str(tmp_path / "g.safetensors"), str(tmp_path / "mask")
    options = ["--value-objective", "output", "--recent-window", "32", "--tokens", "4096", "--quiet"]
    run("-m", "grace_opt", "calibrate", "smollm2-135m", "-o", graphs, *options)
    options = ["--ratio", "0.7", "--value-ratio", "0.5", "--method-option", "key_bits=4", "--quiet"]
    options += ["--method-option", "value_bits=3", "--method-option", "offline_solver=greedy"]
    run("-m", "grace_opt", "solve", graphs, "-o", mask, *options)
    script = Path(__file__).parents[3] / "benchmarks" / "connector.py"
    options = ["--prompts", "1", "--scored", "48", "--format", "json"]
    found = json.loads(run(str(script), "smollm2-135m", mask, *options).splitlines()[-1])
    with capsys.disabled():
        print("\n" + json.dumps(found, indent=1))
    assert found["tokens loaded, as vLLM counts"] == 2048
    assert found["times smaller"] > 7
    assert found["KL, nats a token"] < 0.03
