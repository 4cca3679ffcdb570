"""One model, several users: threads that calibrate, cache and generate at once, in any order of beginning and end."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

import grace_opt.runtime
from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle
from grace_opt.graphs.calibrate import Calibration, calibrate
from grace_opt.models.attention import attending_with, switch
from tests.support.families import ByteTokenizer, tiny_model
from tests.support.generation import random_mask

WINDOW = 100
OPTIONS = Calibration(
    tokens=4 * WINDOW, window=WINDOW, recent_window=8, sinks=2, observation_window=16, value_objective="output"
)


class Turns:
    """Two threads that go on in turns, so that what happens in between is arranged and not hoped for."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)

    def run(self, *works: Callable[[Callable[[], object]], None]) -> None:
        errors: list[BaseException] = []

        def guarded(work: Callable[[Callable[[], object]], None]) -> None:
            try:
                work(self.barrier.wait)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error


def calibrated(model: Any, turn: Callable[[], object] = lambda: None) -> GraphBundle:
    """Graphs of a model; ``turn`` is taken between windows, and in the middle of a pass."""
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: turn() and None)
    text = ["".join(chr(97 + i * i % 26) for i in range(8 * WINDOW))]
    try:
        return calibrate(model, ByteTokenizer(), text, OPTIONS)
    finally:
        handle.remove()


def generated(model: Any, past: Any = None) -> Any:
    ids = torch.arange(3, 43)[None]
    found = model.generate(
        ids, past_key_values=past, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(found.logits)


def assert_equal_graphs(ours: GraphBundle, theirs: GraphBundle) -> None:
    assert len(ours.heads) == len(theirs.heads) > 0
    for one, other in zip(ours.heads, theirs.heads, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("compressed", [False, True])
def test_calibrating_and_generating_at_once_gives_what_each_gives_alone(before: str, compressed: bool) -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation(before)
    mask = random_mask(model, 6, recent_window=3, sinks=1)

    def generate() -> Any:
        if not compressed:
            return generated(model)
        with grace_opt.runtime.cache(mask, model) as past:
            return generated(model, past)

    graphs_alone, logits_alone = calibrated(model), generate()
    found: dict[str, Any] = {}
    done = threading.Event()
    passed: list[Any] = []

    def calibrating(turn: Callable[[], object]) -> None:
        mine = threading.get_ident()

        def step() -> None:  # also runs in the other thread, as the hook is on the model
            if threading.get_ident() == mine and not done.is_set():
                turn()
                turn()

        found["graphs"] = calibrated(model, step)
        assert done.is_set()

    def generating(turn: Callable[[], object]) -> None:
        turn()  # a pass of the calibration stands still in its second layer
        found["logits"] = generate()
        passed.append(model.config._attn_implementation)
        done.set()
        turn()

    Turns().run(calibrating, generating)
    assert passed == ["grace_opt_any"]  # it was indeed in the middle
    torch.testing.assert_close(found["logits"], logits_alone, rtol=1e-6, atol=1e-6)
    assert_equal_graphs(found["graphs"], graphs_alone)
    assert model.config._attn_implementation == before


def test_calibrations_that_overlap_leave_the_model_as_it_was() -> None:
    model = tiny_model("Llama")
    alone = calibrated(model)
    found: list[GraphBundle] = []

    def first(turn: Callable[[], object]) -> None:
        with ExitStack() as stack:
            stack.callback(turn)  # ends while the second is on its way
            stack.enter_context(attending_with(model, lambda *_: None))
            turn()
            turn()
        turn()

    def second(turn: Callable[[], object]) -> None:
        turn()
        back = switch(model, "grace_opt_any")
        found.append(calibrated(model))
        turn()
        turn()
        turn()
        back()

    Turns().run(first, second)
    assert_equal_graphs(found[0], alone)
    assert model.config._attn_implementation == "sdpa"


def test_the_callers_code_may_run_the_model_between_windows() -> None:
    model = tiny_model("Llama")
    alone, logits = calibrated(model), generated(model)

    def pieces() -> Iterator[str]:
        for at in range(8):
            torch.testing.assert_close(generated(model), logits)
            yield "".join(chr(97 + i * i % 26) for i in range(8 * WINDOW))[at * WINDOW : (at + 1) * WINDOW]

    seen: list[Any] = []
    bundle = calibrate(model, ByteTokenizer(), pieces(), OPTIONS, progress=lambda *_: seen.append(generated(model)))
    assert_equal_graphs(bundle, alone)
    assert len(seen) == 4
    for each in seen:
        torch.testing.assert_close(each, logits)


def test_an_error_in_the_middle_of_a_pass_gives_the_model_back() -> None:
    model = tiny_model("Qwen3")

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrated(model, fail)
    assert model.config._attn_implementation == "sdpa"
    calibrated(model)


def test_two_caches_on_one_model_and_a_plain_run_beside_them() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation("eager")
    masks = [random_mask(model, kept, recent_window=3, sinks=1) for kept in (4, 8)]
    plain = generated(model)
    alone = [generated(model, grace_opt.runtime.cache(mask, model)) for mask in masks]
    gc.collect()
    assert model.config._attn_implementation == "eager"
    first, second = (grace_opt.runtime.cache(mask, model) for mask in masks)
    assert torch.equal(generated(model), plain)  # by the eager attention that it had
    assert torch.equal(generated(model, second), alone[1])
    first_logits = generated(model, first)
    first.release()
    assert torch.equal(first_logits, alone[0])
    assert torch.equal(generated(model), plain)
    del second
    gc.collect()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Gemma3Text"])  # soft caps, learnt sinks, windows
def test_a_plain_run_beside_a_cache_keeps_what_only_the_models_own_attention_can_do(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    plain = generated(model)
    back = switch(model, "grace_opt")
    assert torch.equal(generated(model), plain)
    with attending_with(tiny_model("Llama"), lambda *_: 1 / 0):  # of another model
        assert torch.equal(generated(model), plain)
    back()
    assert model.config._attn_implementation == "eager"


def test_models_that_share_a_configuration() -> None:
    one = tiny_model("Llama")
    other = type(one)(one.config).eval()
    assert other.config is one.config
    mask = random_mask(one, 6, recent_window=3, sinks=1)
    plain = generated(other)
    first = grace_opt.runtime.cache(mask, one)
    second = grace_opt.runtime.cache(mask, other)
    assert torch.equal(generated(other), plain)
    first.release()
    assert other.config._attn_implementation == "grace_opt"
    generated(other, second)
    second.release()
    assert one.config._attn_implementation == other.config._attn_implementation == "sdpa"


def test_a_copy_of_a_switched_model_is_not_switched() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation("eager")
    plain = generated(model)
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    with grace_opt.runtime.cache(mask, model) as past:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        generated(model, past)
    for each in copies:
        assert each.config._attn_implementation == "eager"
        assert torch.equal(generated(each), plain)


def test_attention_weights_are_refused_where_there_are_none_and_come_again_afterwards() -> None:
    model = tiny_model("Llama")
    model.set_attn_implementation("eager")
    mask = random_mask(model, 6, recent_window=3, sinks=1)
    ids = torch.arange(3, 33)[None]
    ask: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ask |= {"output_attentions": True, "return_dict_in_generate": True}
    past = grace_opt.runtime.cache(mask, model)
    with pytest.raises(InputError, match="has no attention weights to give; leave out output_attentions"):
        model.generate(ids, past_key_values=past, **ask)
    for _ in range(2):  # beside the cache, and after it
        weights = model.generate(ids, **ask).attentions
        assert [len(step) for step in weights] == [2, 2]
        assert all(torch.is_tensor(layer) for step in weights for layer in step)
        past.release()
    model.config.output_attentions = True
    with pytest.raises(InputError, match="output_attentions"):
        model(ids, past_key_values=grace_opt.runtime.cache(mask, model))
