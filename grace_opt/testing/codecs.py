"""The conformance kit of codecs: what attention over a cache relies on (`grace_opt.compression.codec`).

from grace_opt.testing.codecs import check_codec
check_codec(MyCodec(...))     # the codec of one head; raises AssertionError, in a sentence
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec, stacked
from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import load_mask, save_mask
from grace_opt.compression.plan import CachePlan, LayerPlan
from grace_opt.compression.plugins import CODECS


def check_codec(codec: Codec, *, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Check the codec of one head, of tokens with ``codec.n`` channels. Raises AssertionError with what is wrong.

    ``tolerance`` is relative to the largest score or channel, in float32.
    """
    rng = torch.Generator().manual_seed(seed)
    tokens = max(2 * codec.block, 40)
    x = torch.randn(3, tokens, codec.n, generator=rng)
    query = torch.randn(3, 5, codec.n, generator=rng)
    p = torch.randn(3, 5, tokens, generator=rng).softmax(-1)
    _check_shapes(codec, x, query)
    _check_scores(codec, x, query, tolerance)
    _check_outputs(codec, x, p, tolerance)
    _check_stacks(codec, x, query)
    _check_storage(codec, codec.encode(x))
    _check_file(codec, x)


def _check_shapes(codec: Codec, x: Tensor, query: Tensor) -> None:
    z = codec.encode(x)
    _equal(z.shape, (*x.shape[:-1], codec.width), "encode must give rows of the codec's width")
    r = codec.residual(x, z)
    _equal(r.shape, (*x.shape[:-1], codec.residual_width), "residual must give residual_width numbers a token")
    asked, outside = codec.asked(query)
    _equal(asked.shape, (*query.shape[:-1], codec.width), "asked queries must meet rows")
    _equal(outside.shape, (*query.shape[:-1], codec.residual_width), "asked queries must meet residuals")
    _equal(codec.read(z, r).shape, x.shape, "read must give whole channels")
    assert type(codec).name in CODECS, f"codec {codec.name!r} is not registered; CODECS.register it"


def _check_scores(codec: Codec, x: Tensor, query: Tensor, tolerance: float) -> None:
    z = codec.encode(x)
    asked, outside = codec.asked(query)
    exact = query @ x.mT
    off = asked @ z.mT + outside @ codec.residual(x, z).mT - exact
    spread = float((off - off.mean(-1, keepdim=True)).abs().max())
    assert spread <= tolerance * float(exact.abs().max()), (
        f"scores of whole tokens must be exact but for a number a query; they are off by {spread:.3g}"
    )
    read = codec.read(z, None)
    off = asked @ z.mT - query @ read.mT
    spread = float((off - off.mean(-1, keepdim=True)).abs().max())
    assert spread <= tolerance * float(exact.abs().max()), (
        f"scores of rows must be those of what is read back; they are off by {spread:.3g}"
    )


def _check_outputs(codec: Codec, x: Tensor, p: Tensor, tolerance: float) -> None:
    z = codec.encode(x)
    r = codec.residual(x, z)
    largest = float(x.abs().max())
    off = float((codec.read(p @ z, p @ r) - p @ x).abs().max())
    assert off <= tolerance * largest, f"outputs of whole tokens must be exact; they are off by {off:.3g}"
    off = float((codec.read(p @ z, None) - p @ codec.read(z, None)).abs().max())
    assert off <= tolerance * largest, f"read must be affine in rows; it is off by {off:.3g}"


def _check_stacks(codec: Codec, x: Tensor, query: Tensor) -> None:
    """The cache holds the codecs of several heads as one, and those of a batch's rows."""
    heads = stacked([codec] * 3)
    rows = stacked([heads, heads])
    for many, tokens, asked in ((heads, x, query), (rows, x.expand(2, -1, -1, -1), query.expand(2, -1, -1, -1))):
        z = codec.encode(x)
        for mine, theirs in (
            (many.encode(tokens), z),
            (many.residual(tokens, many.encode(tokens)), codec.residual(x, z)),
            (many.asked(asked)[0], codec.asked(query)[0]),
            (many.read(many.encode(tokens), None), codec.read(z, None)),
        ):
            assert torch.allclose(mine, theirs.expand(mine.shape), atol=1e-5), (
                "a codec must broadcast over leading dimensions"
            )


def _check_storage(codec: Codec, z: Tensor) -> None:
    if codec.block:
        blocks = z[:, : codec.block]
        back = codec.unpack(codec.pack(blocks), z.dtype)
        _equal(back.shape, blocks.shape, "unpack must give the rows that pack took")
        assert torch.equal(back, codec.stored(blocks)), "stored must be what comes back from pack and unpack"
    assert 0 <= codec.nbytes(1, 2) <= codec.nbytes(100, 2), "nbytes must grow with the tokens"


def _check_file(codec: Codec, x: Tensor) -> None:
    """It goes into a mask file and comes back."""
    import tempfile

    json.dumps(codec.parameters(), allow_nan=False)
    mask = KVMask("m", 2, codec.n, CachePlan({0: LayerPlan(0, {"key": [codec, codec]})}))
    with tempfile.TemporaryDirectory() as folder:
        save_mask(replace(mask, num_hidden_layers=1), folder)
        again = load_mask(folder).plan.layers[0].codecs["key"][1]
    _equal(again.signature(), codec.signature(), "a codec must come back from a mask file as it was")
    assert torch.allclose(again.encode(x), codec.encode(x), atol=1e-5), "a codec from a mask file must encode alike"


def _equal(found: object, wanted: object, what: str) -> None:
    assert found == wanted, f"{what}: {found} is not {wanted}"
