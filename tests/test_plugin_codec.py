"""A codec and a token policy of another package are evaluated, put in a mask file and run in generate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_opt.runtime
from grace_opt import load_mask, save_mask
from grace_opt.compression.budget import Budget
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import method
from grace_opt.compression.plugins import CODECS, POLICIES
from grace_opt.evaluate.capture import capture
from grace_opt.evaluate.trial import Trial
from tests.compression.test_codecs import HalvedPairs
from tests.runtime.test_tokens import EveryThird
from tests.support import ROOT
from tests.support.families import tiny_model

ENTRY_POINTS = """[grace_opt.codecs]
halved-pairs = tests.compression.test_codecs:HalvedPairs
[grace_opt.token_policies]
every-third = tests.runtime.test_tokens:EveryThird
"""
OUTSIDE = {"codec": "halved-pairs", "tokens": "every-third", "token_share": 0.7}
WINDOWS = {"recent_window": 6, "sinks": 2, "observation_window": 8}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process in which the other package is installed."""
    info = tmp_path / "outside" / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    here = {name: value for name, value in os.environ.items() if name != "GRACE_OPT_PLUGINS"}
    return {**here, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT), *sys.path])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(99)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w98").save_pretrained(tmp_path / "m")
    tiny_model("Llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_it_runs_in_a_new_process(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    words = " ".join(f"w{(7 * i) % 90 + 2}" for i in range(400))
    (tmp_path / "text.txt").write_text(words)

    def run(*arguments: Any) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "grace_opt", *map(str, arguments), "-f", "json"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        return list(json.loads(result.stdout)["records"])

    options: list[Any] = []
    for name, value in {**OUTSIDE, **WINDOWS}.items():
        options += ["--method-option", f"grace-opt.{name}={value}"]
    common = ("evaluate", folder, "--text", tmp_path / "text.txt", "--length", 60, "--scored", 20, "--prompts", 2)
    model = tiny_model("Llama")
    captured = capture(model, [(7 * i) % 90 + 2 for i in range(81)], 60, 8)
    plan = Trial("x", method("grace-opt", {**OUTSIDE, **WINDOWS}), Budget(0.5)).plan(captured)
    save_mask(KVMask("tiny", 2, 16, plan, num_hidden_layers=2), tmp_path / "mask")
    assert load_mask(tmp_path / "mask").plan.layers[0].tokens == plan.layers[0].tokens
    ours, by_mask = run(*common, "--method", "grace-opt", "--ratio", 0.5, *options, "--mask", tmp_path / "mask")
    assert ours["options"]["codec"] == "halved-pairs"
    assert ours["bytes_per_token"] < 0.75 * ours["full_bytes_per_token"]
    assert by_mask["kl"]["mean"] == pytest.approx(ours["kl"]["mean"], rel=1e-3)
    prompt = ("--prompt", " ".join(words.split()[:60]), "--max-new-tokens", 5)
    (generated,) = run("generate", folder, "--mask", tmp_path / "mask", *prompt)
    assert generated["tokens"] == 64
    assert generated["cache_bytes"] < 0.75 * generated["full_cache_bytes"]


def test_without_the_package_the_mask_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    assert HalvedPairs.name in CODECS
    assert EveryThird.name in POLICIES
    model = tiny_model("Llama")
    captured = capture(model, list(range(3, 84)), 60, 8)
    plan = Trial("x", method("grace-opt", {**OUTSIDE, **WINDOWS}), Budget(0.5)).plan(captured)
    with torch.inference_mode(), grace_opt.runtime.cache(plan, model) as past:
        model(torch.tensor([list(range(3, 63))]), past_key_values=past)
        assert past.layers[0].length < 60
    mask = KVMask("tiny", 2, 16, plan, num_hidden_layers=2)
    save_mask(replace(mask, model="m"), tmp_path / "mask")
    command = [sys.executable, "-m", "grace_opt", "generate", str(folder), "--mask", str(tmp_path / "mask")]
    bare = {**os.environ, "GRACE_OPT_PLUGINS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([*command, "--prompt", "w1 w2"], capture_output=True, text=True, env=bare, check=False)
    assert result.returncode == 2
    assert "unknown codec 'halved-pairs'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
