"""Decode greedily from a folder in MLX-LM: python -m grace_opt.export.mlx_decode ASKED ANSWER"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(asked: str, answer: str) -> None:
    """Read what is asked, and write the tokens and their log-probabilities.

    JSON: ``folder``, ``prompt`` (a text or ids), ``new_tokens``.
    """
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    model, tokenizer = load(told["folder"])
    ids = tokenizer.encode(told["prompt"]) if isinstance(told["prompt"], str) else told["prompt"]
    tokens, scores = list[int](), list[float]()
    for token, row in generate_step(mx.array(ids), model, max_tokens=told["new_tokens"]):
        tokens.append(int(token))
        scores.append(float(row.astype(mx.float32)[int(token)]))
    Path(answer).write_text(json.dumps({"tokens": tokens, "log_probabilities": scores}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
