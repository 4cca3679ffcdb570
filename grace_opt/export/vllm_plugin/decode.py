"""Decode greedily from an exported folder in vLLM: python -m grace_opt.export.vllm_plugin.decode ASKED ANSWER

A process of its own: vLLM 0.32 for CPUs does not start in one that has loaded numba's compiler already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(asked: str, answer: str) -> None:
    """Read what is asked, JSON: ``folder``, ``dtype``, ``prompts``, ``new_tokens``; write tokens and their scores."""
    from vllm import LLM, SamplingParams

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    longest = max(map(len, told["prompts"])) + told["new_tokens"]
    llm = LLM(told["folder"], dtype=told["dtype"], enforce_eager=True, skip_tokenizer_init=True, max_model_len=longest)
    settings = SamplingParams(
        temperature=0, max_tokens=told["new_tokens"], ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in told["prompts"]], settings, use_tqdm=False)
    found = []
    for output in outputs:
        tokens, scores = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        own = [each[token].logprob for token, each in zip(tokens, scores, strict=True)]
        found.append({"tokens": tokens, "log_probabilities": own})
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
