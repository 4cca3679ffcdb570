"""Random masks for tiny models, and generation with a pruned cache beside the reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch

import grace_opt.runtime
from grace_opt import KVMask
from grace_opt.compression.readout import Readout, ReadoutRecipe
from grace_opt.runtime.cache import PrunedCache
from tests.support.reference import use_zero_channel_attention
from tests.support.slack import assert_logits, logit_slack


def random_mask(
    model: Any,
    kept: int | None,
    *,
    recent_window: int,
    sinks: int,
    seed: int = 0,
    readout: str = "none",
    ragged: bool = False,
    values: int | None = None,
    generated: Any = "prune",
) -> KVMask:
    """A mask of ``kept`` random key channels (and ``values`` value channels) in every full-attention layer of a tiny
    model; a static read-out is random.

    ``ragged``: one channel more for every second head.
    """
    rng = np.random.default_rng(seed)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    keeps: dict[str, dict[int, Any]] = {"k": {}, "v": {}}
    for letter, count in (("k", kept), ("v", values)):
        for layer, kind in enumerate(types if count is not None else []):
            if kind == "full_attention":
                keeps[letter][layer] = tuple(
                    np.sort(rng.choice(dim, count + (ragged and head % 2), replace=False)).astype(np.int32)
                    for head in range(heads)
                )
    readouts: dict[Any, Readout] = {}
    for letter, keep in keeps.items():
        for layer, head in product(keep if readout == "static" else (), range(heads)):
            width = len(keep[layer][head])
            matrix = 0.3 * rng.normal(size=(dim - width, width))
            readouts["key" if letter == "k" else "value", layer, head] = Readout(rng.normal(size=dim - width), matrix)
    return KVMask.of_channels(
        "tiny",
        heads,
        dim,
        keeps["k"],
        keeps["v"],
        num_hidden_layers=config.num_hidden_layers,
        recent_window=recent_window,
        sinks=sinks,
        generated=generated,
        readout=ReadoutRecipe() if readout == "prefill" else None,
        readouts=readouts,
    )


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 21 tokens, two of them padded on the left."""
    ids = torch.randint(3, 99, (3, 21), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, :7] = 0
    attended[2, :2] = 0
    return ids, attended


def run(model: Any, past: Any, new_tokens: int = 24, **more: Any) -> Any:
    ids, attended = prompts()
    return model.generate(
        ids,
        attention_mask=attended,
        past_key_values=past,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


def steps(one: Any, other: Any, tolerance: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of each step of two generations, of the rows whose tokens are the same so far.

    Where the two best logits of a row are closer than both may be wrong, rounding decides which token comes, and what
    follows is another text. Raises AssertionError where tokens differ otherwise, and at all among beams.
    """
    if len(other.sequences) != len(other.logits[0]):
        assert torch.equal(one.sequences, other.sequences)
    same = torch.ones(len(other.logits[0]), dtype=torch.bool)
    for step, (ours, theirs) in enumerate(zip(one.logits, other.logits, strict=True), -len(other.logits)):
        yield ours[same], theirs[same]
        if len(other.sequences) == len(same):
            best = theirs.topk(2).values
            differ = same & (one.sequences[:, step] != other.sequences[:, step])
            assert not (differ & (best[:, 0] - best[:, 1] > 2 * tolerance)).any(), f"tokens differ at step {step}"
            same &= ~differ


def assert_same(pruned: Any, reference: Any) -> None:
    for ours, theirs in steps(pruned, reference, logit_slack(reference.logits)):
        assert_logits(ours, theirs)


def compare(model: Any, mask: KVMask, options: dict[str, Any] | None = None, **more: Any) -> PrunedCache:
    past = grace_opt.runtime.cache(mask, model, **(options or {}))
    pruned = run(model, past, **more)
    use_zero_channel_attention(model, mask)
    assert_same(pruned, run(model, None, **more))
    return past


def logits_of(
    model: Any, past: Any, chunks: list[int], ids: torch.Tensor, attended: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of the real tokens of each chunk, one forward pass a chunk."""
    low, pieces = int(past.get_seq_length()), []
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for size in chunks:
            part = slice(low, low + size)
            low += size
            out = model(
                input_ids=ids[:, part],
                attention_mask=attended[:, :low],
                position_ids=positions[:, part],
                past_key_values=past,
            )
            pieces.append(out.logits[attended[:, part].bool()])
    return pieces
