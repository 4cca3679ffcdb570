"""vLLM on the model itself and on the folder that grace-opt export wrote for it, in turn, in processes of their own.

    python benchmarks/in_vllm.py MODEL FOLDER [--length 1024] [--requests 1] [--new-tokens 32]

Run it with the Python that has vLLM and grace-opt. Prints, for each, what vLLM says of its caches and how long it took:
tokens that fit in the same memory, bytes of an old token, the prompts' tokens a second, decoded tokens a second. The
last column is a ratio to the model itself. On a CPU, VLLM_CPU_KVCACHE_SPACE says how many GiB the caches have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from math import nan
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, metavar=("MODEL", "FOLDER"))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--requests", type=int, default=1, help="prompts in one batch")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--repeats", type=int, default=3, help="the fastest counts; 0: only what vLLM says of its caches"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options)))
        return
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
    records = []
    for folder in options.folders:
        command = [sys.executable, __file__, "--one", folder, folder]
        for name in ("length", "requests", "new_tokens", "repeats", "dtype"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{options.requests} x {options.length} tokens, {options.new_tokens} new, {options.dtype}")
    print(f"{'':34}{'model':>12}{'export':>12}{'ratio':>8}")
    for name, plain in records[0].items():
        ours = records[1][name]
        print(f"{name:34}{plain:12.1f}{ours:12.1f}{ours / plain:8.2f}")


def measured(options: Any) -> dict[str, float]:
    """What one folder does."""
    from vllm import LLM, SamplingParams

    longest = options.length + options.new_tokens
    llm = LLM(
        options.folders[0],
        dtype=options.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    prompts = [
        {"prompt_token_ids": [3 + (7 * i + j) % 1000 for i in range(options.length)]} for j in range(options.requests)
    ]

    def seconds() -> tuple[float, float]:
        """Until all prompts have their first token, and from there to the end."""
        settings = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True, detokenize=False)
        began = time.monotonic()
        told = [each.metrics for each in llm.generate(prompts, settings, use_tqdm=False)]
        first = max(each.first_token_ts for each in told)
        return first - began, max(each.last_token_ts for each in told) - first

    runs = [seconds() for _ in range(options.repeats)]
    prefill, decoding = map(min, zip(*runs, strict=True)) if runs else (nan, nan)
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    old = groups[0].kv_cache_spec
    return {
        "tokens that fit": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "bytes of an old token": len(groups[0].layer_names) * old.page_size_bytes / old.block_size,
        "prompt tokens a second": options.requests * options.length / prefill,
        "decoded tokens a second": options.requests * (options.new_tokens - 1) / decoding,
    }


if __name__ == "__main__":
    main()
