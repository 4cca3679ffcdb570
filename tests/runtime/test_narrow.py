"""Prompts computed on what is stored: the same as token by token, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grace_opt.runtime import cache
from grace_opt.runtime.generate import forced
from grace_opt.runtime.narrow import prefill_narrow
from tests.support.families import tiny_model
from tests.support.generation import random_mask

IDS = torch.randint(3, 99, (1, 61), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [1, 7, 61])
@pytest.mark.parametrize(("window", "sinks", "ragged"), [(12, 2, False), (12, 0, True), (1, 3, True), (100, 2, False)])
def test_a_narrow_prompt_is_one_that_comes_token_by_token(chunk: int, window: int, sinks: int, ragged: bool) -> None:
    model = tiny_model("Llama")
    options: dict[str, Any] = {"readout": "static", "values": 7, "ragged": ragged}
    plan = random_mask(model, 6, recent_window=window, sinks=sinks, **options).plan
    with torch.inference_mode(), cache(plan, model) as past:
        steps = [model(input_ids=IDS[:, i : i + 1], past_key_values=past).logits[0] for i in range(IDS.shape[1])]
    found: list[Any] = []
    with torch.inference_mode(), cache(plan, model) as past:
        prefill_narrow(lambda **given: found.append(model(**given).logits[0]), past, IDS, chunk)
    torch.testing.assert_close(torch.cat(found), torch.cat(steps), atol=1e-4, rtol=1e-4)


def test_decoding_goes_on_after_a_narrow_prompt() -> None:
    model = tiny_model("Llama")
    plan = random_mask(model, 6, recent_window=8, sinks=2, readout="static", values=7).plan
    run, tokens = forced(model, IDS, 5, plan, narrow=True)
    whole, _ = forced(model, IDS, tokens, plan)
    assert not torch.allclose(run.logits, whole.logits, atol=1e-3)
    row = torch.cat([IDS, tokens[None, :-1]], dim=1)
    with torch.inference_mode(), cache(plan, model) as past:
        steps = [model(input_ids=row[:, i : i + 1], past_key_values=past).logits[0] for i in range(row.shape[1])]
    torch.testing.assert_close(run.logits, torch.cat(steps)[IDS.shape[1] - 1 :], atol=1e-4, rtol=1e-4)
