"""Decode greedily from a GGUF file in llama.cpp: python -m grace_opt.export.gguf_decode ASKED ANSWER

A process of its own: where llama.cpp does not like a file, it ends it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(asked: str, answer: str) -> None:
    """Read what is asked, and write tokens, their scores, and how many tokens the prompt has.

    JSON: ``file``, ``prompt`` (a text or ids), ``new_tokens``, ``exact`` (a cache of float32).
    """
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    params = CommonParams()
    params.model.path = told["file"]
    params.n_ctx = -(-(len(told["prompt"]) + told["new_tokens"] + 1) // 256) * 256
    params.n_parallel = 1
    for each in (params.cpuparams, params.cpuparams_batch):  # llama.cpp's threads wait busily
        each.n_threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.warmup = False
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if told["exact"]:
        params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    said = Server(params).handle_completions(
        {
            "prompt": told["prompt"],
            "max_tokens": told["new_tokens"],
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,
        }
    )
    if "choices" not in said:
        raise SystemExit(f"llama.cpp did not answer: {said}")
    tokens = said["__verbose"]["tokens"]
    known = ((said["choices"][0].get("logprobs") or {}).get("content")) or []
    found = {"tokens": tokens, "log_probabilities": scores_of(tokens, known)}
    Path(answer).write_text(json.dumps(found | {"prompt_tokens": said["usage"]["prompt_tokens"]}), encoding="utf-8")


def scores_of(tokens: list[int], known: list[dict[str, Any]]) -> list[float | None]:
    """Of each token; None in the middle of a character, of which llama.cpp tells the last token only."""
    left, found = list(known), list[float | None]()
    for token in tokens:
        found.append(left.pop(0)["logprob"] if left and left[0]["id"] == token else None)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
