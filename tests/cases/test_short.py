"""Short prompts, absurd windows and wrong arguments: no bytes for nothing, and a sentence before anything is loaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import grace_opt.runtime
from grace_opt import InputError
from grace_opt.cli.app import app
from grace_opt.runtime.generate import plain_cache
from tests.support.families import tiny_model
from tests.support.generation import logits_of, random_mask
from tests.support.slack import assert_logits

INT4 = {"key_bits": 4, "value_bits": 4}


@cache
def tiny() -> Any:
    return tiny_model("Llama", num_hidden_layers=2, max_position_embeddings=512)


def fill(past: Any, tokens: int, decoded: int = 0) -> Any:
    with torch.inference_mode():
        for size in (tokens, *[1] * decoded):
            tiny()(input_ids=torch.full((1, size), 5), past_key_values=past)
    return past


@pytest.mark.parametrize("generated", ["keep", "prune"])
@pytest.mark.parametrize("readout", ["none", "prefill", "static"])
@pytest.mark.parametrize("options", [{}, INT4], ids=["as they come", "4 bits"])
def test_a_cache_pays_from_where_it_says(generated: Any, readout: str, options: dict[str, int]) -> None:
    mask = random_mask(tiny(), 7, values=8, recent_window=8, sinks=2, generated=generated, readout=readout)
    first = 16 * 2  # bytes of where the rows begin
    for tokens, decoded in ((6, 3), (10, 0), (4, 6)):
        past = fill(grace_opt.runtime.cache(mask, tiny(), **options), tokens, decoded)
        assert past.nbytes - grace_opt.runtime.full_cache_nbytes(past) <= first
    pays = past.pays_from
    for tokens in (pays - 1, pays, pays + 40):
        past = fill(grace_opt.runtime.cache(mask, tiny(), **options), tokens)
        assert (past.nbytes < grace_opt.runtime.full_cache_nbytes(past)) == (tokens >= pays)


def test_what_a_prompt_chooses_pays_where_it_says_and_some_never_do() -> None:
    for name, ratio in (("grace-opt", 0.5), ("think", 0.25)):
        make = lambda name=name, ratio=ratio: grace_opt.runtime.online_cache(tiny(), name, ratio=ratio)  # noqa: E731
        pays = fill(make(), 3).pays_from
        for tokens in (pays - 1, pays):
            past = fill(make(), tokens)
            assert (past.nbytes < grace_opt.runtime.full_cache_nbytes(past)) == (tokens == pays)
    assert fill(grace_opt.runtime.online_cache(tiny(), "grace-opt", ratio=0.0), 3).pays_from is None
    assert fill(grace_opt.runtime.online_cache(tiny(), "svd", ratio=0.5), 3).pays_from is None


@pytest.mark.parametrize("options", [{}, {"max_length": 80}], ids=["growing", "preallocated"])
def test_absurd_windows_see_everything_whole_and_allocate_nothing(options: dict[str, int]) -> None:
    ids, attended = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(0)), torch.ones(2, 40).long()
    attended[1, :9] = 0
    expected = logits_of(tiny(), plain_cache(tiny()), [20, 1, 18, 1], ids, attended)
    for sinks, recent in ((10**9, 4), (2, 10**9), (30, 2)):
        mask = random_mask(tiny(), 7, values=8, recent_window=recent, sinks=sinks)
        past = grace_opt.runtime.cache(mask, tiny(), **options)
        found = logits_of(tiny(), past, [20, 1, 18, 1] if sinks != 30 else [20, 1], ids, attended)
        for ours, theirs in zip(found, expected, strict=False):
            assert_logits(ours, theirs)
        assert past.nbytes < 3 * 2 * 80 * 2 * 2 * 32 * 4


def test_sinks_that_come_after_the_prompt_have_room_when_they_come() -> None:
    """As if they had come with the prompt: a row of 3 tokens has 6 sinks, one of 40 has them all."""
    mask = random_mask(tiny(), 7, values=8, recent_window=2, sinks=6)
    ids = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[1, :37] = 0
    steps = [40, *[1] * 6]
    together = logits_of(tiny(), grace_opt.runtime.cache(mask, tiny()), steps, ids, attended)
    alone = logits_of(
        tiny(), past := grace_opt.runtime.cache(mask, tiny()), [3, *steps[1:]], ids[1:, 37:], attended[1:, 37:]
    )
    for ours, theirs in zip(together[1:], alone[1:], strict=True):
        assert_logits(ours[1:], theirs)
    assert past.layers[0].key_side.whole.shape[2] == 6


def test_what_is_no_plan_and_what_is_no_number_is_a_sentence() -> None:
    wrong: Any
    for wrong in (None, 3, {}):
        with pytest.raises(InputError, match=f"a KVMask or a CachePlan, not of {type(wrong).__name__}"):
            grace_opt.runtime.cache(wrong, tiny())
    model = tiny_model("Llama", num_hidden_layers=1)
    model.model.embed_tokens.weight.data[7] = float("nan")
    for method, options in (("svd", {}), ("grace-opt", INT4)):
        past = grace_opt.runtime.online_cache(model, method, ratio=0.5, value_ratio=0.5, **options)
        with pytest.raises(InputError, match="are not finite"), torch.inference_mode():
            model(input_ids=torch.tensor([[*[5] * 20, 7, *[5] * 120]]), past_key_values=past)
    layer = grace_opt.runtime.cache(random_mask(model, 7, recent_window=2, sinks=1), model).layers[0]
    for shape in ((0, 2, 5, 16), (1, 2, 0, 16)):
        with pytest.raises(InputError, match="was given no tokens"):
            layer.update(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate {} --method thimk", "unknown method 'thimk'"),
        ("generate {} --method think --ratio 1.5", "the ratio must be at least 0 and below 1"),
        ("generate {} --method think --key-bits 5", "key_bits must be 2, 3, 4 or 8"),
        ("generate {} --method think --method-option recent_window=-1", "recent_window must be from 0"),
        ("generate {} --method think --method-option recent_windw=1", "no option 'recent_windw'"),
        ("generate {} --method think --method-option solver=qubo", "greedy or the independent solver"),
        ("generate {} --method think --generated later", "generated must be keep or prune"),
        ("generate {} --generated keep", "give --mask or --method too"),
        ("generate {} --method-option sinks=1", "--method-option goes with --method"),
        ("generate {} --max-new-tokens 0", "must be at least 1"),
        ("generate {} --num-beams -2", "must be at least 1"),
        ("calibrate {} -o g.safetensors --recent-window -1", "recent_window must not be negative"),
        ("calibrate {} -o g.safetensors --sinks 1000000000", "no prunable key between 1000000000 sinks"),
        ("calibrate {} -o g.safetensors --observation-window 2000", "observation window of 2000 is longer"),
        ("evaluate {} --method think --ratio 0.5 --length 0", "length must be at least 1, got 0"),
        ("evaluate {} --method think --ratio 0.5 --scored -3", "scored tokens must be at least 1, got -3"),
        ("evaluate {} --method think --ratio 0.5 --prompts 0", "prompts must be at least 1, got 0"),
        ("evaluate {} --method think --ratio 0.5 --task needel", "did you mean 'needle'"),
        ("evaluate {} --method think --budget-share 1.5", "above 0 and at most 1, got 1.5"),
        ("evaluate {} --method think --ratio 0.5 --method-option think.recent_window=-1", "recent_window must be from"),
        ("solve b.safetensors --ratio 0.5 -o m --recent-window -1", "recent_window must be from 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    arguments: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("grace_opt.models.load.load_model", load)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments.format("no-such-model").split(), input="a prompt")
    assert isinstance(result.exception, InputError), result.exception
    assert said in str(result.exception)
