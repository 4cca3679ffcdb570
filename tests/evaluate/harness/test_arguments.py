"""What --model_args may say, and the sentences about what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grace_opt import InputError, save_mask
from grace_opt.compression.method import Method
from grace_opt.evaluate.harness.arguments import parsed
from tests.support.families import tiny_model
from tests.support.generation import random_mask


def test_a_method_with_options() -> None:
    made = parsed(
        {"pretrained": "m", "method": "think+int8", "budget_share": "0.25", "recent_window": 16, "dtype": "float32"}
        | {"batch_size": 4}
    )
    assert made.trial is not None
    assert isinstance(made.trial.what, Method)
    assert (made.trial.what.key_bits, made.trial.what.windows.recent_window) == (8, 16)
    assert made.trial.budget.share == 0.25
    assert made.loading == {"pretrained": "m", "dtype": "float32"}
    assert made.theirs == {"batch_size": 4}
    assert made.about["method"] == "think+int8"
    assert made.about["options"]["recent_window"] == 16


@pytest.mark.parametrize("name", ["grace-opt", "int4", "streaming"])
def test_with_the_whole_share_nothing_is_compressed(name: str) -> None:
    assert parsed({"pretrained": "m", "method": name, "budget_share": 1}).trial is None


def test_a_mask(tmp_path: Path) -> None:
    save_mask(random_mask(tiny_model("Llama"), 8, recent_window=8, sinks=2), tmp_path / "mask")
    made = parsed({"pretrained": "m", "mask": str(tmp_path / "mask")})
    assert made.trial is not None
    assert made.about["options"]["recent_window"] == 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "grace-op", "budget_share": 0.5}, "unknown method 'grace-op'; did you mean 'grace-opt'?"),
        ({"budget_share": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"budget_share": 0}, "above 0 and at most 1, got 0"),
        ({"budget_share": "half"}, "must be a number above 0 and at most 1, got 'half'"),
        ({"budget_share": True}, "above 0 and at most 1"),
        ({"method": "think"}, "there is no budget; give budget_share="),
        ({"mask": "folder", "method": "think"}, "leave out method, or the mask"),
        ({"mask": "folder", "budget_share": 0.5, "sinks": 2}, "leave out budget_share and sinks, or the mask"),
        ({"mask": "no/such/folder"}, "no/such/folder"),
        ({"budget_shar": 0.5}, "no argument 'budget_shar'; did you mean 'budget_share'?"),
        ({"budget_share": 0.5, "recent_windw": 8}, "did you mean 'recent_window'?"),
        ({"budget_share": 0.5, "parallelize": True}, "no argument 'parallelize'"),
        ({"budget_share": 0.5, "key_bits": 5}, "key_bits must be 2, 3, 4 or 8"),
        ({"budget_share": 0.5, "offline_solver": "greedy"}, "is for bundles"),
        ({"budget_share": 0.5, "method": "streaming", "ridge": 0.1}, "ridge has no effect"),
        ({"budget_share": 0.5, "pretrained": None}, "there is no model; give pretrained="),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed({"pretrained": "m", **given})
    assert sentence in str(caught.value)
