"""The Triton kernels in the runtime, interpreted, beside the plain one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import grace_opt.runtime
from grace_opt.compression import tiles
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.tokens.base import Tier, TokenPolicy, TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.graphs.observed import Observed
from grace_opt.runtime.attention import compressed
from grace_opt.runtime.kernels import choose, split
from grace_opt.runtime.kernels import triton as kernel
from tests.support.families import tiny_model
from tests.support.generation import assert_same, logits_of, random_mask, run
from tests.support.slack import assert_logits

# The interpreter's numpy says when a mask of float32's minimum passes to -inf, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize(
    ("recent_window", "sinks", "generated", "ragged", "static"),
    [
        (0, 0, "prune", False, False),
        (4, 2, "prune", True, False),
        (4, 2, "keep", True, False),
        (4, 2, "prune", False, True),
        (500, 3, "prune", False, True),
        (4, 2, "keep", False, True),
    ],
)
def test_generation_is_the_same_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, recent_window: int, sinks: int, generated: str, ragged: bool, static: bool
) -> None:
    """Padded rows, grouped queries, read-outs: the kernel beside the plain path."""
    model = tiny_model("Llama", num_hidden_layers=1)
    windows: dict[str, Any] = {"recent_window": recent_window, "sinks": sinks, "generated": generated}
    mask = random_mask(model, 7, values=9, ragged=ragged, readout="static", **windows)
    options: dict[str, Any] = {"max_length": 40} if static else {}
    plain = run(model, grace_opt.runtime.cache(mask, model, **options), new_tokens=5)
    calls = counted(monkeypatch)
    fused = run(model, grace_opt.runtime.cache(mask, model, **options), new_tokens=5)
    assert_same(fused, plain)
    assert len(calls) == 4 * (2 if ragged else 1)


@dataclass(frozen=True)
class EverySecond(TokenPolicy):
    """Of a prompt's old tokens, in rows that begin at their own token."""

    tier: Tier = Tier.COMPRESSED
    name: ClassVar[str] = "every-second"

    def tiers(self, seen: Observed, share: float) -> Tensor:
        at = torch.arange(seen.keys.shape[1], device=seen.keys.device)
        return torch.where(at % 2 == 0, int(self.tier), int(Tier.DROPPED)).to(torch.int8)


@pytest.mark.parametrize("generated", ["keep", "prune"])
@pytest.mark.parametrize("codec", ["channels", "whole", "lowrank"])
def test_tokens_that_stay_are_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch, codec: str, generated: str) -> None:
    """Rows with different numbers of tokens, and codecs of every kind."""
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static", generated=generated)
    (layer,) = mask.plan
    basis = LowRank(torch.linalg.qr(torch.randn(16, 16))[0], torch.randn(9))
    codecs = {"channels": layer.codecs, "whole": {}, "lowrank": {k: [basis, basis] for k in layer.codecs}}[codec]
    policy: TokenPolicy = Streaming() if codec == "whole" else EverySecond()
    plan = CachePlan({0: replace(layer, codecs=codecs, tokens=TokenRule(policy, 0.5))})
    plain = run(model, grace_opt.runtime.cache(plan, model), new_tokens=5)
    calls = counted(monkeypatch)
    past = grace_opt.runtime.cache(plan, model)
    assert_same(run(model, past, new_tokens=5), plain)
    assert past.layers[0].length < past.get_seq_length()
    assert len(calls) == 4


def test_whole_tokens_anywhere_are_left_to_the_plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    (layer,) = random_mask(model, 7, values=9, recent_window=4, sinks=2).plan
    plan = CachePlan({0: replace(layer, tokens=TokenRule(EverySecond(Tier.WHOLE), 0.5))})
    calls = counted(monkeypatch)
    past = grace_opt.runtime.cache(plan, model)
    run(model, past, new_tokens=5)
    assert not calls
    assert "no whole tokens but sinks" in str(choose.reasons(past.layers[0])["triton"])


@pytest.mark.parametrize(("padding", "key_bits", "value_bits"), [(6, 4, 4), (70, 8, 4), (100, 4, 8)])
def test_integers_are_read_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, padding: int, key_bits: int, value_bits: int
) -> None:
    """Blocks, and what came before and after them, with a padded row that has as many, fewer or none; packed as tokens
    come. The plain kernel reads the same blocks."""
    monkeypatch.setattr(tiles, "DEVICES", {"cpu"})
    model = tiny_model("Llama", num_hidden_layers=1).half()
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 142), generator=torch.Generator().manual_seed(0))
    attended = torch.ones_like(ids)
    attended[0, :padding] = 0
    calls = counted(monkeypatch)
    logits = []
    for name in ("plain", None):
        past = grace_opt.runtime.cache(mask, model, key_bits=key_bits, value_bits=value_bits, kernel=name)
        chunks = [80, 1, 1, 50, 1, 1, 6, 1, 1]
        logits.append(torch.cat(logits_of(model, past, chunks, ids, attended)))
    assert past.layers[0].key_side.buffer.packed_tokens == 128
    assert len(calls) == 6
    torch.testing.assert_close(logits[1], logits[0], atol=5e-2, rtol=0)


def test_a_compiled_step_by_the_kernel_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static")
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    logits: list[list[Tensor]] = []
    for fused in (False, True):
        calls = counted(monkeypatch) if fused else []
        past = grace_opt.runtime.cache(mask, model, max_length=30)
        torch._dynamo.reset()
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if fused else model.forward
        with torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            logits.append([step(input_ids=ids[:, at : at + 1], past_key_values=past).logits for at in range(6)])
    assert len(calls) == 6
    assert_logits(logits[1], logits[0])


class Launches(TorchDispatchMode):
    """Counts operations that would launch something on a card, and those that wait for it."""

    VIEWS = ("view", "slice", "select", "transpose", "permute", "expand", "unsqueeze", "squeeze", "alias", "detach")
    NOTHING = (*VIEWS, "_unsafe_view", "as_strided", "empty", "new_empty", "empty_like", "unbind", "split", "t", "lift")
    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in self.READS:
            self.reads.append(name)
        elif name not in (*self.NOTHING, "decode"):  # decode is counted apart
            self.launches.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["growing", "preallocated", "integers"])
def test_launches_and_host_reads_of_64_steps(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of a layer, from the new token's states to its output: six launches at most, but where a block is packed or the
    buffers grow, and nothing waits for the device."""
    monkeypatch.setattr(tiles, "DEVICES", {"cpu"})
    calls = counted(monkeypatch, run=False)
    model = tiny_model("Llama", num_hidden_layers=1).half()
    (plan,) = random_mask(model, 7, values=9, recent_window=4, sinks=2, readout="static").plan
    options = {"integers": {"key_bits": 4, "value_bits": 4}, "preallocated": {"max_length": 500}}.get(case, {})
    past = grace_opt.runtime.cache(CachePlan({0: plan}), model, **options)
    module, layer = torch.nn.Module(), past.layers[0]
    module.num_key_value_groups = 2

    def states(tokens: int) -> list[Tensor]:
        return [torch.randn(2, heads, tokens, 16).half() for heads in (4, 2, 2)]

    def step(query: Tensor, keys: Tensor, values: Tensor) -> None:
        compressed(module, query, *layer.update(keys, values), None)

    with torch.no_grad():
        step(*states(400))
        if case == "preallocated":  # on a CPU the length is looked at, to say a sentence; not on a card
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        each = []
        for new in [states(1) for _ in range(64)]:
            with Launches() as seen:
                step(*new)
            assert not seen.reads
            each.append(3 + len(seen.launches))  # three kernels
    assert len(calls) == 64
    assert sorted(each)[40] <= 6, (each, seen.launches)  # buffers of 400 tokens grow by three


def counted(monkeypatch: pytest.MonkeyPatch, run: bool = True) -> list[int]:
    """Let the runtime use the kernel, and note each call; without running it, if so."""
    calls: list[int] = []
    decode = kernel.decode

    def noted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if run:
            return decode(*arguments, **named)
        with _disable_current_modes():  # rows that nobody wrote
            for side in arguments[1:3]:
                side.rows.nan_to_num_(posinf=0, neginf=0)
        return torch.empty_like(arguments[0])

    monkeypatch.setattr(split, "INTERPRETED", True)
    monkeypatch.setattr(kernel, "decode", noted)
    return calls


def test_the_chooser_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    ids = torch.randint(3, 99, (1, 60))

    def reasons_for(generated: str = "prune", **options: Any) -> dict[str, bool | str]:
        mask = random_mask(model, 7, values=9, recent_window=4, sinks=2, generated=generated)
        with grace_opt.runtime.cache(mask, model, **options) as past, torch.no_grad():
            model(input_ids=ids, past_key_values=past)
            found = choose.reasons(past.layers[0])
        assert found["plain"] is True
        return found

    if not torch.cuda.is_available():
        assert "cards" in str(reasons_for()["triton"])
    monkeypatch.setattr(split, "INTERPRETED", True)
    assert reasons_for()["triton"] is True
    assert reasons_for("keep")["triton"] is True
    assert reasons_for("keep", max_length=80)["triton"] is True
    assert "integers of 4 or 8 bits only" in str(reasons_for(key_bits=2, value_bits=2)["triton"])
    monkeypatch.setattr(tiles, "DEVICES", {"cpu"})
    assert "integers of both sides or none" in str(reasons_for(key_bits=4)["triton"])
