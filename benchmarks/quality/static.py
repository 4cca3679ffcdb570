"""Masks that are calibrated on other text, with read-outs per prompt, static or none, against masks per prompt.

python benchmarks/quality/static.py [--documents 6] [-f markdown]
"""

from __future__ import annotations

from typing import Annotated

import typer
from study import (
    TEXTS,
    DocumentsOption,
    FormatOption,
    ModelOption,
    PrefixOption,
    ScoredOption,
    TextOption,
    by_method,
    load,
    measure,
    named,
    show,
)

from grace_opt import METHODS, Budget, Calibration, calibrate, mask_from_solutions, problems_of, solve_many
from grace_opt.evaluate.documents import read_documents
from grace_opt.evaluate.trial import Trial


def main(
    model: ModelOption = "smollm2-135m",
    text: TextOption = TEXTS / "wikipedia.jsonl",
    documents: DocumentsOption = 6,
    prefix: PrefixOption = 2048,
    scored: ScoredOption = 256,
    windows: Annotated[int, typer.Option(help="Windows of text to calibrate on, each as long as a prompt.")] = 4,
    format: FormatOption = "table",
) -> None:
    """Measure and print."""
    loaded, tokenizer, chosen = load(model, text, documents, prefix, scored)
    sources = {
        "Python's documentation": [document.text for document in read_documents(None)],
        "other articles": [document.text for document in read_documents(text)][::-1],
    }
    trials = [named("per prompt / per prompt", "grace-opt", ratio) for ratio in (0.5, 0.7)]
    for name, pieces in sources.items():
        for words, options in (("", {}), (", windows of 128 queries", {"observation_window": 128})):
            about = Calibration(tokens=windows * prefix, window=prefix, protection=None, **options)  # type: ignore[arg-type]
            bundle = calibrate(loaded, tokenizer, ("\n\n" + piece for piece in pieces), about, text_name=name)
            for ratio in (0.5, 0.7):
                solutions = solve_many(problems_of(bundle, METHODS["grace-opt"], Budget(ratio)), "greedy")
                for scope, label in (("prefill", "per prompt"), ("static", "static"), ("none", "none")):
                    mask = mask_from_solutions(bundle, solutions, readout_scope=scope)
                    trials.append(Trial(f"{name}{words} / {label}", mask, Budget(ratio)))
    show(f"Mask / read-out, keys, {documents} documents", by_method(measure(loaded, chosen, trials)), format)


if __name__ == "__main__":
    typer.run(main)
