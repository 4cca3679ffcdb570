"""Runs vLLM and says what came of it: python runner.py ASKED ANSWER, two JSON files.

A process of its own, since vLLM for CPUs does not start in one that has loaded numba's compiler.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COUNTED = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:external_prefix_cache_hits")


def main(asked: str, answer: str) -> None:
    from vllm import LLM, SamplingParams

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    llm = LLM(told["folder"], skip_tokenizer_init=True, disable_log_stats=False, max_logprobs=-1, **told["settings"])
    found: list[Any] = []
    for batch in told["batches"]:
        settings = SamplingParams(
            temperature=0, max_tokens=batch["new_tokens"], ignore_eos=True, logprobs=-1, detokenize=False
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in batch["prompts"]], settings, use_tqdm=False)
        texts = [(list(each.outputs[0].token_ids), each.outputs[0].logprobs) for each in outputs]
        requests = [
            {"tokens": tokens, "logs": [[each[i].logprob for i in range(len(each))] for each in logs]}
            for tokens, logs in texts
        ]
        counts = {each.name: each.value for each in llm.get_metrics() if each.name in COUNTED}
        found.append({"requests": requests, "counts": counts})
    config = llm.llm_engine.vllm_config.cache_config
    record = {"batches": found, "tokens_that_fit": config.kv_cache_size_tokens, "groups": _groups(llm)}
    Path(answer).write_text(json.dumps(record), encoding="utf-8")


def _groups(llm: Any) -> list[dict[str, Any]]:
    """What vLLM holds in each group of caches; only of an engine in this process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return []
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    return [
        {
            "spec": type(group.kv_cache_spec).__name__,
            "layers": len(group.layer_names),
            "block": group.kv_cache_spec.block_size,
            "page": group.kv_cache_spec.page_size_bytes,
        }
        for group in groups
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
