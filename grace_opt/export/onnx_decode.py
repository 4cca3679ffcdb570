"""Decode greedily from a folder in ONNX Runtime GenAI: python -m grace_opt.export.onnx_decode ASKED ANSWER"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(asked: str, answer: str) -> None:
    """Read what is asked, and write the tokens, their log-probabilities, and the ids of a text.

    JSON: ``folder``, ``prompt`` (ids), ``new_tokens``, ``text``.
    """
    from onnxruntime_genai import Generator, GeneratorParams, Model, Tokenizer

    told = json.loads(Path(asked).read_text(encoding="utf-8"))
    model = Model(told["folder"])
    ids = [int(each) for each in Tokenizer(model).encode(told["text"])]
    params = GeneratorParams(model)
    params.set_search_options(max_length=len(told["prompt"]) + told["new_tokens"] + 1)
    generator = Generator(model, params)
    tokens, scores, fed = list[int](), list[float](), told["prompt"]
    for _ in range(told["new_tokens"]):  # GenAI's own search would stop at the token that ends a text
        generator.append_tokens(np.array(fed, dtype=np.int32))
        row = np.asarray(generator.get_logits(), dtype=np.float64).reshape(-1)
        fed = [int(row.argmax())]
        tokens += fed
        scores.append(float(row.max() - np.logaddexp.reduce(row)))
    Path(answer).write_text(json.dumps({"tokens": tokens, "log_probabilities": scores, "ids": ids}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
