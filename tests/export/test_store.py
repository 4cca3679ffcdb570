"""Stored caches: what comes back is what the codecs say, head by head; what is damaged is found, wherever it is."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_opt.runtime
from grace_opt import InputError, KVMask, save_mask
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plan import CachePlan
from grace_opt.compression.readout import moments
from grace_opt.compression.tokens.base import TokenRule
from grace_opt.compression.tokens.streaming import Streaming
from grace_opt.export.store import KVStore
from grace_opt.export.store.frames import MAGIC
from grace_opt.export.store.store import Prompt, dynamic_cache
from grace_opt.heads import KINDS
from tests.support.exports import tiny, tiny_mask

SINKS, WINDOW = 2, 8


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()[0]


def states(mask: KVMask, tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    shape = (rows, mask.num_key_value_heads, tokens, mask.head_dim)
    layers = range(mask.layer_count)
    return [tuple(torch.randn(shape, generator=rng).to(dtype) for _ in KINDS) for _ in layers]


def with_bits(mask: KVMask, key: int, value: int) -> KVMask:
    return replace(mask, plan=mask.plan.changed(bits={"key": key, "value": value}))


def low_rank(mask: KVMask) -> KVMask:
    """The same mask with a projection of 5 coordinates in place of channels, another one for each head."""
    tokens = torch.randn(50, 50, mask.head_dim, generator=torch.Generator().manual_seed(3))
    made = iter([LowRank.of_moments(each).of_width(5) for each in moments(tokens, None, 0.0)])
    layers = {
        i: replace(plan, codecs={kind: [next(made) for _ in codecs] for kind, codecs in plan.codecs.items()})
        for i, plan in mask.plan.layers.items()
    }
    return replace(mask, plan=CachePlan(layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [(0, 0), (4, 3), (2, 8)], ids=str)
@pytest.mark.parametrize("variant", [{}, {"ragged": True}, {"values": None}, {"low_rank": True}], ids=str)
def test_tokens_come_back_as_their_codecs_say(
    model: Any, variant: dict[str, Any], bits: tuple[int, int], dtype: torch.dtype
) -> None:
    more = dict(variant)
    lowered = more.pop("low_rank", False)
    mask = with_bits(low_rank(tiny_mask(model)) if lowered else tiny_mask(model, **more), *bits)
    store, kv = KVStore(mask), states(mask, 77, rows=2, dtype=dtype)
    back = store.decode(store.encode(kv))
    old = slice(SINKS, 77 - WINDOW)
    for index, (pair, found) in enumerate(zip(kv, back, strict=True)):
        for kind, x, y in zip(KINDS, pair, found, strict=True):
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            wanted = x.clone()
            for row in range(2):
                for head, codec in enumerate(mask.plan.layers[index].codecs.get(kind, ())):
                    tokens, sized = x[row, head, old].float(), codec.sized(mask.head_dim)
                    wanted[row, head, old] = sized.read(sized.stored(sized.encode(tokens)), None).to(dtype)
            tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
            off = (y.float() - wanted.float()).abs() > tolerance * (1 + wanted.float().abs())
            # Where a basis is multiplied, rounding decides between two codes now and then, and a token is read by it.
            assert off.float().mean() <= (0.02 if lowered and any(bits) else 0)
            for whole in (slice(0, SINKS), slice(77 - WINDOW, 77)):
                assert torch.equal(y[:, :, whole], x[:, :, whole])


def test_a_read_out_is_fitted_to_what_the_prompt_attends_to(model: Any) -> None:
    mask = with_bits(tiny_mask(model, readout="prefill"), 4, 4)
    store = KVStore(mask)
    assert store.queries == 32
    captured = store.prefill(model, torch.randint(4, 99, (100,), generator=torch.Generator().manual_seed(2)).tolist())
    back = store.decode(store.encode(captured))
    zeros = KVStore(with_bits(tiny_mask(model, readout="none"), 4, 4))
    plain = zeros.decode(zeros.encode(captured))
    seen = captured.observed(32, mask.windows, 2)
    for index, layer in enumerate(captured.past.layers):
        weights = seen[index].token_weights[..., None]
        for x, fitted, without in zip((layer.keys, layer.values), back[index], plain[index], strict=True):
            errors = [((each - x)[0, :, SINKS:-WINDOW].square() * weights).sum() for each in (fitted, without)]
            assert errors[0] < errors[1]
    with pytest.raises(InputError, match="which a cache alone does not tell; store what KVStore.prefill gives"):
        store.encode(captured.past)
    short = states(mask, SINKS + WINDOW)  # nothing is old: nothing is fitted
    assert torch.equal(store.decode(store.encode(short))[0][0], short[0][0])


def test_size_follows_from_the_mask_and_bytes_from_the_cache(model: Any) -> None:
    mask = with_bits(tiny_mask(model), 4, 3)
    store = KVStore(mask)
    for tokens in (1, 9, 10, 11, 42, 43, 500):
        data = store.encode(states(mask, tokens), dtype="bfloat16")
        assert 0 < len(data) - store.nbytes(tokens) < 1000
        assert data == store.encode(states(mask, tokens), dtype="bfloat16")
    whole = 2 * sum(each.numel() for pair in states(mask, 4096) for each in pair)
    # 8 of 16 channels at 4 + 1 and 3 + 1 bits; 10 whole tokens; the channels of a token of values share a scale by 8.
    bits = 8 * (4 + 1) + 8 * 3 + 32
    assert store.nbytes(4096) / whole == pytest.approx(bits / (2 * 16 * 16) + 10 / 4096, rel=0.03)


def test_a_stored_cache_is_a_stream(model: Any, tmp_path: Path) -> None:
    mask = with_bits(tiny_mask(model), 4, 4)
    save_mask(mask, tmp_path / "mask")
    store, other = KVStore(mask), KVStore.open(tmp_path / "mask")  # as another process would
    kv = states(mask, 90)
    pieces = list(store.frames(kv))
    assert len(pieces) == 1 + mask.layer_count

    class Trickle(io.RawIOBase):
        """Gives seven bytes at a time."""

        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def read(self, size: int = -1) -> bytes:
            return self.data.read(min(size, 7))

    stream: Any = Trickle(b"".join(pieces))
    for found, wanted in zip(other.stream(stream), store.decode(b"".join(pieces)), strict=True):
        assert all(map(torch.equal, found, wanted))
    size = store.save(kv, tmp_path / "prompt.kv")
    assert size == (tmp_path / "prompt.kv").stat().st_size
    past = other.load(tmp_path / "prompt.kv")
    assert past.get_seq_length() == 90
    with pytest.raises(InputError, match="no such file"):
        other.load(tmp_path / "absent.kv")
    with pytest.raises(InputError, match="not finite"):
        store.save([(keys * torch.nan, values) for keys, values in kv], tmp_path / "nan.kv")
    assert not (tmp_path / "nan.kv").exists()


def test_a_prompt_of_another_engine_is_stored_as_one_of_transformers(model: Any) -> None:
    mask = with_bits(tiny_mask(model, readout="prefill"), 4, 4)
    store = KVStore(mask)
    captured = store.prefill(model, torch.randint(4, 99, (60,), generator=torch.Generator().manual_seed(2)).tolist())
    layers = captured.past.layers
    asked = [captured.queries[i] for i in range(len(layers))]
    prompt = Prompt([(each.keys, each.values) for each in layers], asked, captured.scaling[0])
    assert store.encode(prompt) == store.encode(captured)


def test_a_stored_cache_may_say_what_it_is_of(model: Any, tmp_path: Path) -> None:
    mask = with_bits(tiny_mask(model), 4, 4)
    store, kv = KVStore(mask), states(mask, 60)
    data = store.encode(kv, key="this")
    assert header_of(data)["key"] == "this"
    assert "key" not in header_of(store.encode(kv))
    assert store.verify(data) == store.verify(data, key="this") == 60
    for source in (data, store.encode(kv)):
        with pytest.raises(InputError, match="is the cache of another prompt or model than its name says"):
            store.verify(source, key="that")
        with pytest.raises(InputError, match="is the cache of another prompt or model than its name says"):
            list(store.stream(source, key="that"))
    assert store.save(kv, tmp_path / "a.kv", key="this") == len(data)
    assert (tmp_path / "a.kv").read_bytes() == data


def test_whoever_takes_a_piece_keeps_its_own_mode(model: Any) -> None:
    mask = with_bits(tiny_mask(model, readout="prefill"), 4, 4)
    store = KVStore(mask)
    ids = torch.randint(4, 99, (1, 60), generator=torch.Generator().manual_seed(2))
    captured = store.prefill(model, ids[0].tolist())
    pieces = []
    for piece in store.frames(captured):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        pieces.append(piece)
    past = dynamic_cache(store.stream(b"".join(pieces)), "cpu")
    model(ids[:, :4], past_key_values=past).logits.sum().backward()  # a prompt that was stored can be trained behind
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_whatever_is_damaged_is_found(model: Any) -> None:
    mask = with_bits(tiny_mask(model), 4, 4)
    store, kv = KVStore(mask), states(mask, 60)
    data = store.encode(kv)
    rng = torch.Generator().manual_seed(0)
    places = [*range(0, 400, 13), *torch.randint(0, len(data), (60,), generator=rng).tolist(), len(data) - 1]
    for at in places:
        with pytest.raises(InputError, match="truncated|no stored cache"):
            store.decode(data[:at])
        altered = bytearray(data)
        altered[at] ^= 1 << at % 8
        for read in (store.decode, store.verify):
            with pytest.raises(InputError, match="altered|no stored cache|truncated|a header of|contradicts"):
                read(bytes(altered))
    with pytest.raises(InputError, match="the stored cache goes on after its last layer; store the prompt again"):
        store.decode(data + b"\0")
    pieces = list(store.frames(kv))
    swapped = b"".join([pieces[0], pieces[2], pieces[1], *pieces[3:]])
    with pytest.raises(InputError, match="altered or damaged in layer 0"):
        store.decode(swapped)
    foreign = b"".join([*pieces[:2], *list(store.frames(states(mask, 60, seed=1)))[2:]])
    with pytest.raises(InputError, match="altered or damaged in layer 1"):
        store.decode(foreign)


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<I", data[len(MAGIC) : len(MAGIC) + 4])
    found: dict[str, Any] = json.loads(data[len(MAGIC) + 4 :][:length])
    return found


def with_header(about: Any) -> bytes:
    """A file with a header whose checksum is right, and nothing else."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    start = MAGIC + struct.pack("<I", len(text)) + text
    return start + hashlib.sha256(start).digest()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "of format grace-opt-kv version 2, and version 1 of grace-opt-kv is read here; use the grace"),
        ({"format": "\x1b[31m"}, r"of format \\x1b\[31m version 1"),
        ({"mask": "0"}, "was stored by another mask, of 'tiny'; open it with the mask that stored it"),
        ({"tokens": 1 << 40}, "contradicts itself"),
        ({"tokens": True}, "contradicts itself"),
        ({"tokens": 0}, "contradicts itself"),
        ({"rows": -1}, "contradicts itself"),
        ({"rows": 1.0}, "contradicts itself"),
        ({"dtype": "int8"}, "contradicts itself"),
        ({"stored": ["float32"]}, "contradicts itself"),
        ({"layers": 99}, "contradicts itself"),
        ({"rows": 1 << 16, "tokens": 1 << 28}, "truncated: it ends in layer 0"),  # 2 EB are asked for, and none come
    ],
    ids=str,
)
def test_a_header_promises_nothing_that_is_not_checked(model: Any, change: dict[str, Any], sentence: str) -> None:
    mask = tiny_mask(model)
    store = KVStore(mask)
    about = header_of(store.encode(states(mask, 20)))
    with pytest.raises(InputError, match=sentence):
        store.decode(with_header(about | change))


def test_headers_that_are_none(model: Any) -> None:
    store = KVStore(tiny_mask(model))
    for data, sentence in (
        (b"", "truncated: it ends in its header"),
        (b"PK\3\4" * 40, "is no stored cache"),
        (MAGIC + struct.pack("<I", 1 << 31), "a header of 2147483648 bytes, of 65536 allowed"),
        (with_header(b"[1]"), "a header that is no object"),
        (with_header(b"{"), "a header that is not JSON"),
        (with_header(b'{"a": NaN}'), "a header that is not JSON"),
    ):
        with pytest.raises(InputError, match=sentence):
            store.decode(data, "the file")


def test_what_cannot_be_stored_is_said(model: Any) -> None:
    mask = tiny_mask(model)
    store, kv = KVStore(mask), states(mask, 30)
    other = tiny("Llama", head_dim=32)[0]
    with pytest.raises(InputError, match="the mask's model 2; use its own"):
        store.encode(kv[:1])
    with pytest.raises(InputError, match=r"layer 0 of the cache has keys of .*32\], and the mask's model"):
        store.encode(states(tiny_mask(other), 30))
    with pytest.raises(InputError, match=r"layer 1 of the cache has values of torch.float16"):
        store.encode([kv[0], (kv[1][0], kv[1][1].half())])
    with pytest.raises(InputError, match="a cache of int8 cannot be stored; use one of float32"):
        store.encode(kv, dtype="int8")
    with pytest.raises(InputError, match="the cache is empty; run a prompt first"):
        store.encode([(keys[:, :, :0], values[:, :, :0]) for keys, values in kv])
    rule = TokenRule(Streaming(), 0.5)
    drops = {i: replace(each, tokens=rule) for i, each in mask.plan.layers.items()}
    with pytest.raises(InputError, match="a stored cache cannot drop tokens"):
        KVStore(replace(mask, plan=CachePlan(drops)))
    past = grace_opt.runtime.cache(mask, model)
    model(torch.randint(4, 99, (1, 30)), past_key_values=past)
    with pytest.raises(InputError, match="does not hold all of its tokens whole; run the prompt on a DynamicCache"):
        store.encode(past)
