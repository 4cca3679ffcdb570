"""What is solved for a target, the target takes; what it cannot run is said before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_opt import load_mask
from grace_opt.export.abilities import Abilities, Needs, refusals
from grace_opt.export.run import load_manifest
from grace_opt.export.target import TARGETS
from tests.cli.test_cli import inside, sentence
from tests.support.exports import WORDS, tiny_bpe

LIMIT = ("--kl-limit", "inf")  #: what a random model loses says nothing
SHARES = {"gguf": 0.9, "hf": 0.9, "mlx": 0.9, "onnx": 0.9}  #: of those that keep all keys; the others take .6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its graphs."""
    folder = tmp_path_factory.mktemp("solve-for")
    model, tokenizer = tiny_bpe()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    line = ("--text", folder / "words.txt", "--tokens", 192, "--window", 64, "--recent-window", 8, "-q")
    done = inside("calibrate", folder / "model", "-o", folder / "g", "--value-objective", "output", *line)
    assert done.returncode == 0, done.stderr
    return folder


def solved(work: Path, output: Path, *more: Any) -> Any:
    return inside("solve", work / "g", "-o", output, "--solver", "greedy", "-f", "json", *more)


@pytest.mark.parametrize("name", sorted(TARGETS._known))
def test_what_is_solved_for_a_target_is_exported_without_more_options(work: Path, name: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnx", reason="pip install grace-opt[onnx]")
    share = SHARES.get(name, 0.6)
    done = solved(work, tmp_path / "m", "--target", name, "--budget-share", share)
    assert done.returncode == 0, done.stderr
    assert f"for {name}: " in done.stderr or not TARGETS[name].can.method_options()
    assert any(record["prune"] for record in json.loads(done.stdout)["records"])
    done = inside("export", tmp_path / "m", work / "model", "--to", name, "-o", tmp_path / "out", *LIMIT)
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out", name)["target"] == name


def test_what_the_user_says_stays_where_the_target_runs_it(work: Path, tmp_path: Path) -> None:
    more = ("--recent-window", 64, "--sinks", 1, "--readout", "none", "--ratio", 0.25, "--budget", "uniform")
    assert solved(work, tmp_path / "m", "--target", "vllm", *more).returncode == 0
    mask = load_mask(tmp_path / "m")
    assert (mask.windows.recent_window, mask.windows.sinks, mask.windows.generated) == (64, 1, "prune")
    assert mask.readout_scope == "none"
    assert solved(work, tmp_path / "m", "--target", "vllm", "--ratio", 0.25).returncode == 0
    mask = load_mask(tmp_path / "m")
    assert (mask.windows.recent_window, mask.windows.sinks, mask.readout_scope) == (256, 4, "static")
    assert solved(work, tmp_path / "m", "--target", "vllm", "--ratio", 0.25, "--method", "think").returncode == 0
    assert load_mask(tmp_path / "m").readout_scope == "none"  # think has none
    assert solved(work, tmp_path / "m", "--target", "hf", "--value-ratio", 0.25).returncode == 0
    assert set(load_mask(tmp_path / "m").keep_matrix("key").ravel()) == {True}


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("vlm", ("--ratio", 0.5), "unknown target 'vlm'; did you mean 'vllm'"),
        ("vllm", ("--ratio", 0.5, "--readout", "prefill"), "solve with --readout static or none"),
        ("vllm", ("--ratio", 0.5, "--method-option", "generated=keep"), "solve with --method-option generated=prune"),
        ("vllm", ("--ratio", 0.5, "--method-option", "key_bits=4"), "solve without key_bits and value_bits"),
        ("vllm", ("--ratio", 0), "needs a mask that compresses keys or values; solve with a ratio above 0"),
        ("hf", ("--ratio", 0.5), "cannot prune keys, only values; solve with --ratio 0 and --value-ratio"),
        ("hf", ("--value-ratio", 0.5, "--recent-window", 8), "solve with --recent-window 0 --sinks 0"),
        ("hf", ("--value-ratio", 0.5, "--sinks", 8), "solve with --recent-window 0 --sinks 0"),
        ("hf", ("--value-ratio", 0.5, "--budget", "shared"), "solve with --budget uniform"),
        ("hf", ("--budget-share", 0.5), "at least 0.751 of the uncompressed bytes"),
        ("hf", (), "give either --ratio or --budget-bytes or --budget-share"),
        ("vllm", ("--ratio", 0.5, "--budget-tokens", 9), "--budget-tokens goes with --budget-share"),
        ("vllm", ("--budget-share", 0.5, "--budget-tokens", 0), "must have from 1 to"),
        ("vllm", ("--budget-share", 0.5, "--budget-tokens", 300), "lower the method's floor or windows"),
    ],
)
def test_what_a_target_cannot_run_is_said(
    work: Path, target: str, arguments: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    assert said in sentence(solved(work, tmp_path / "m", "--target", target, *arguments, "-q"))
    assert not (tmp_path / "m" / "kv_mask.json").exists()


def test_every_refusal_says_a_cure() -> None:
    nothing = Abilities(
        kinds=(),
        one_width=True,
        readouts=("none",),
        integers=False,
        token_policies=False,
        choices=False,
        whole_tokens=False,
        generated="prune",
    )
    flags = dict.fromkeys(("integers", "token_policies", "choices", "whole_tokens"), True)
    most = Needs(("key", "value"), "static", 2, prefill="pruned", generated="keep", all_layers=False, **flags)
    said = list(refusals(nothing, most))
    assert len(said) == 11
    assert all("; solve " in each or "; make " in each for each in said)
    assert list(refusals(Abilities(), Needs(("key",), "prefill", 2, generated="keep", **flags))) == []
