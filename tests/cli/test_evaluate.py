"""grace-opt evaluate --target: a mask is measured as its runtime runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grace_opt import load_mask, save_mask
from grace_opt.evaluate.documents import Document, passages
from grace_opt.export.target import TARGETS, Source
from tests.cli.test_cli import inside, records, sentence
from tests.support.exports import WORDS, tiny, tiny_mask

SHORT = ("--length", 100, "--scored", 16, "--prompts", 2, "-q", "-f", "json")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text, and masks."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = tiny()
    save_mask(tiny_mask(model), folder / "mask")
    save_mask(tiny_mask(model, kept=None, recent_window=0, sinks=0), folder / "stock")
    save_mask(tiny_mask(model, readout="prefill", generated="keep"), folder / "prompts")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    return folder


def measured(work: Path, *more: Any) -> Any:
    return inside("evaluate", work / "model", "--text", work / "words.txt", *SHORT, *more)


@pytest.mark.parametrize(
    ("target", "mask", "near"),
    [  # a stock model computes the first token on what is stored too, our cache whole
        ("vllm", "mask", 1e-5),
        ("kv-store", "mask", 1e-5),
        ("hf-generate", "prompts", 1e-5),
        ("hf", "stock", 3e-3),
    ],
)
def test_a_mask_as_a_target_runs_it(work: Path, target: str, mask: str, near: float) -> None:
    model, tokenizer = tiny()
    chosen = passages([Document("words", WORDS, cut=True)], tokenizer, 100, 16, 2)
    export = TARGETS[target]().measure(Source(load_mask(work / mask), model, tokenizer, "a/model", chosen))
    (record,) = records(measured(work, "--mask", work / mask, "--target", target))
    assert record["kl"]["mean"] == pytest.approx(export["kl"]["mean"], rel=near)
    assert record["options"]["prefill"] == TARGETS[target].can.prefill
    (plain,) = records(measured(work, "--mask", work / mask))
    as_it_is = target == "hf-generate"
    assert (plain["kl"]["mean"] == pytest.approx(export["kl"]["mean"], rel=near)) == as_it_is


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "vlm", "--mask", "mask"), "unknown target 'vlm'; did you mean 'vllm'"),
        (("--target", "vllm", "--method", "think", "--ratio", 0.5), "--target runs masks, not methods"),
        (("--target", "vllm", "--mask", "mask", "--keep-generated"), "is as with --prune-generated"),
        (("--target", "kv-store", "--mask", "mask", "--prune-generated"), "is as with --keep-generated"),
        (("--target", "vllm", "--mask", "prompts"), "the target vllm cannot fit read-outs to each prompt; solve with"),
        (("--target", "hf", "--mask", "mask"), "the target hf cannot prune keys"),
    ],
)
def test_what_a_target_does_not_run_is_said(work: Path, arguments: tuple[Any, ...], said: str) -> None:
    given = [work / each if each in ("mask", "prompts") else each for each in arguments]
    assert said in sentence(measured(work, *given))
