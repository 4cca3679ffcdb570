"""vLLM in a process of its own (tests/export/in_vllm/runner.py), for tests that .ci/vllm runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

RUNNER = Path(__file__).parents[1] / "export" / "in_vllm" / "runner.py"
BIG = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 3, "max_position_embeddings": 1024}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 48,
}


def in_vllm(folder: Path, batches: list[tuple[list[list[int]], int]], work: Path, **settings: Any) -> dict[str, Any]:
    """What vLLM says of batches (prompts, tokens to decode after each), ``said`` being what it logs."""
    asked, answer = work / "asked.json", work / "answer.json"
    told = {"folder": str(folder), "settings": SETTINGS | settings}
    told["batches"] = [{"prompts": prompts, "new_tokens": count} for prompts, count in batches]
    asked.write_text(json.dumps(told), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
    environment |= {"VLLM_CPU_SIM_MULTI_NUMA": "1"} if settings.get("tensor_parallel_size", 1) > 1 else {}
    command = [sys.executable, str(RUNNER), str(asked), str(answer)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.is_file(), run.stderr[-3000:]
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found | {"said": run.stdout + run.stderr}


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of so many random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 99, length).tolist() for length in lengths]
