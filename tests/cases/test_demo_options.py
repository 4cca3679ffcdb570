"""demo honours what its flags and the config file say of the model, the calibration and the solver."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_opt import load_bundle, load_mask
from tests.cli import test_cli
from tests.cli.test_cli import inside, records, sentence

tiny_folder = test_cli.tiny_folder


def test_flags_and_config_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{4 + i * 7 % 95}" for i in range(400)))
    (tmp_path / "c.toml").write_text(
        f"""
        [model]
        dtype = "bfloat16"
        [calibration]
        text = "{tmp_path / "text.txt"}"
        tokens = 128
        window = 64
        recent_window = 8
        objective = "centered"
        [solver]
        solver = "greedy"
        solver_option = "direction=best"
        seed = 3
        node_limit = 5
        [generation]
        max_new_tokens = 2
        """
    )
    line = ("demo", tiny_folder, "-o", tmp_path / "demo", "--context", 100, "--config", tmp_path / "c.toml")
    ended = inside(*line, "--sinks", 2, "-f", "json")
    found = records(ended)
    assert ended.stderr.startswith("warning: greedy honours no node limit")
    assert found[-1]["solver"] == "greedy"
    about = load_bundle(tmp_path / "demo" / "graphs.safetensors").metadata
    for name, value in {"tokens": 128, "window": 64, "recent_window": 8, "sinks": 2, "objective": "centered"}.items():
        assert about[name] == str(value)
    assert about["text"] == str(tmp_path / "text.txt")
    mask = load_mask(tmp_path / "demo" / "mask")
    assert mask.solver["options"] == {"direction": "best"}
    assert mask.plan.layers[0].windows.recent_window == 8
    full = found[0]
    assert full["cache_bytes"] == (100 + 2 - 1) * 2 * 2 * 32 * 2  # of two bytes a number, as the dtype says


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--solver-option", "directon=best", "--solver", "greedy"), "did you mean 'direction'"),
        (("--tokens", -1), "tokens"),
        (("--objective", "logits"), "did you mean 'logit'"),
        (("--device", "gpu"), "gpu"),
    ],
)
def test_what_cannot_be_is_a_sentence(
    arguments: tuple[object, ...], said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    assert said in sentence(inside("demo", tiny_folder, "-o", tmp_path / "demo", "-q", *arguments))
