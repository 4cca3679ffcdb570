"""benchmarks/runtime.py on a tiny model: its rows, its counts, its peak."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

from tests.support import ROOT
from tests.support.families import ByteTokenizer, tiny_model
from tests.support.slack import assert_logits

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("runtime")
    sys.modules.pop("runtime", None)


def test_rows_of_a_tiny_model(runtime: Any) -> None:
    model = tiny_model("Llama", max_position_embeddings=4096)
    records = runtime.run(model, ByteTokenizer(), [1500], [1, 2], [0.5, 0.75], [0.5], 4)
    assert [record["cache"] for record in records[:2]] == ["dynamic", "static"]
    assert len(records) % 2 == 0
    for block in (records[: len(records) // 2], records[len(records) // 2 :]):
        dense = block[0]
        assert (dense["cache"], dense["ratio"], dense["tpot_ratio"]) == ("dynamic", 0, 1.0)
        assert dense["cache_bytes"] == dense["counted_bytes"] == (1500 + 4 + 3) * dense["batch"] * 2 * 2 * 32 * 4
        for record in block:
            assert record["ttft_s"] > 0
            assert record["tpot_s"] > 0
            assert record["peak_bytes"] >= 0.99 * record["cache_bytes"]
            if record["counted_bytes"] is not None:
                assert record["counted_bytes"] <= record["cache_bytes"] <= 1.03 * record["counted_bytes"]
        pruned = [
            record["cache_bytes"] for record in block if record["cache"] == "pruned" and not record["value_ratio"]
        ]
        assert dense["cache_bytes"] > pruned[0] > pruned[1]
        assert sum(record["value_ratio"] > 0 for record in block) == 3
    assert records[-1]["batch"] == 2


def test_the_peak_sees_what_is_freed_again(runtime: Any) -> None:
    with runtime.peak_of(torch.device("cpu")) as peak:
        held = torch.zeros(1 << 20)
        (held.repeat(16) * 2).sum()
    assert 2 * 64 << 20 < peak["bytes"] < 2.2 * 64 * (1 << 20)


def test_the_inflated_cache_reads_zeros(runtime: Any) -> None:
    """ThinK's cache gives what the reference gives whose generated tokens stay whole: here, none leaves the window."""
    from caches import think_cache  # type: ignore[import-not-found]

    from tests.support.generation import random_mask, run
    from tests.support.reference import use_zero_channel_attention

    model = tiny_model("Llama")
    mask = random_mask(model, 7, recent_window=32, sinks=0)
    ids = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(0))
    past = think_cache(mask, model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
        ours = model(input_ids=ids[:, :1], past_key_values=past).logits
    plain = run(model, None)  # the model is untouched
    assert plain.sequences.shape == (3, 45)
    from transformers import DynamicCache

    whole = random_mask(model, 7, recent_window=33, sinks=0)  # the new token comes on top of ThinK's 32
    use_zero_channel_attention(model, whole)
    reference = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=reference)
        theirs = model(input_ids=ids[:, :1], past_key_values=reference).logits
    assert_logits(ours, theirs)
