"""Every codec passes the kit, and so does one from outside the package, which then runs everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from torch import Tensor

from grace_opt import InputError
from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole, bytes_of, stacked
from grace_opt.compression.integers import Integers
from grace_opt.compression.lowrank import LowRank
from grace_opt.compression.plugins import CODECS
from grace_opt.compression.readout import moments
from grace_opt.testing.codecs import check_codec
from tests.support.observed import observed_layers


@CODECS.register
@dataclass(frozen=True, eq=False)
class HalvedPairs(Codec):
    """Outside the package: the mean of each two channels, in float16."""

    channels: int

    name: ClassVar[str] = "halved-pairs"

    @property
    def n(self) -> int:
        return self.channels

    @property
    def width(self) -> int:
        return self.channels // 2

    @property
    def block(self) -> int:
        return 4

    @classmethod
    def fit(cls, seen: Any, kind: Any, widths: Sequence[int], **options: Any) -> list[Self]:
        return [cls((seen.keys if kind == "key" else seen.values).shape[-1]) for _ in widths]

    def encode(self, x: Tensor) -> Tensor:
        return (x[..., ::2] + x[..., 1::2]) / 2

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query[..., ::2] + query[..., 1::2], query

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        whole = total.repeat_interleave(2, dim=-1)
        return whole if residual is None else whole + residual

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        return (z.half(),)

    def unpack(self, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return held[0].to(dtype)

    def stored(self, z: Tensor) -> Tensor:
        return z.half().to(z.dtype)


def lowrank(width: int, metric: bool) -> LowRank:
    rng = np.random.default_rng(2)
    tokens = torch.as_tensor(rng.normal(size=(1, 50, 16)) @ rng.normal(size=(16, 16)) + 3, dtype=torch.float32)
    seen = rng.normal(size=(40, 16))
    return LowRank.of_moments(moments(tokens, None, 0.0)[0], seen.T @ seen if metric else None).of_width(width)


def channels(readout: bool) -> Channels:
    rng = np.random.default_rng(1)
    read = (rng.normal(size=(11, 5)), rng.normal(size=11)) if readout else ()
    return Channels.keeping([0, 3, 4, 9, 15], 16, *read)


CASES: dict[str, Codec] = {
    "whole": Whole(16),
    "channels": channels(False),
    "channels with a read-out": channels(True),
    "channels read as their mean": replace(channels(True), matrix=None),
    "no channel": Channels.keeping([], 16),
    "all channels": Channels.keeping(np.arange(16), 16),
    "svd": lowrank(6, False),
    "kq-svd": lowrank(6, True),
    "all of a basis": lowrank(16, True),
    "integers of channels": Integers(channels(True), 4, "channel"),
    "integers of a basis": Integers(lowrank(7, True), 3, "token"),
    "integers of whole tokens": Integers(Whole(16), 8, "channel"),
    "from outside": HalvedPairs(16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kit_passes(name: str) -> None:
    check_codec(CASES[name])


def test_the_kit_finds_what_is_wrong() -> None:
    class Wrong(HalvedPairs):
        def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
            return query[..., ::2], query

    class Short(HalvedPairs):
        def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
            return super().read(total, None)

    class Lossy(HalvedPairs):
        def stored(self, z: Tensor) -> Tensor:
            return z

    for wrong, words in ((Wrong, "scores of whole tokens"), (Short, "outputs of whole tokens"), (Lossy, "stored must")):
        with pytest.raises(AssertionError, match=words):
            check_codec(wrong(16))


def test_projections_are_the_best_of_their_width() -> None:
    seen = observed_layers(3)[0]
    tokens = seen.keys[0, seen.prunable]
    centred = (tokens - tokens.mean(0)).double()
    best = torch.linalg.svdvals(centred)[6:].square().sum()
    codec = LowRank.fit(seen, "key", [6, 6])[0]
    lost = (codec.read(codec.encode(tokens), None) - tokens).double().square().sum()
    torch.testing.assert_close(lost, best, rtol=1e-4, atol=0)
    asked = seen.grouped[0].double()
    other = LowRank.fit(seen, "key", [6, 6], basis="kq-svd")[0]
    errors = [
        (asked @ (each.read(each.encode(tokens), None) - tokens).double().mT).square().sum() for each in (codec, other)
    ]
    assert errors[1] < errors[0]
    with pytest.raises(InputError, match="did you mean 'kq-svd'"):
        LowRank.fit(seen, "key", [6, 6], basis="kqsvd")


def test_bytes_are_those_of_the_tensors() -> None:
    codec = Integers(channels(False), 3, "channel")
    packed = codec.pack(torch.randn(2, 32, 5))
    assert 2 * codec.nbytes(32, 4) == sum(each.nbytes for each in packed)
    by_token = Integers(Whole(48), 2, "token")
    assert by_token.nbytes(64, 2) == sum(each.nbytes for each in by_token.pack(torch.randn(2, 32, 48)))


def test_codecs_of_one_signature_are_stacked_and_others_are_not_alike() -> None:
    one, other = Channels.keeping([1, 2], 6), Channels.keeping([0, 5], 6)
    assert one.signature() == other.signature() != Channels.keeping([0, 1, 2], 6).signature()
    assert Integers(one, 4, "token").signature() != Integers(one, 3, "token").signature()
    together = stacked([one, other])
    x = torch.arange(12.0).view(2, 1, 6)
    assert together.encode(x).tolist() == [[[1, 2]], [[6, 11]]]


def test_names_are_unique_and_unknown_ones_are_refused() -> None:
    with pytest.raises(InputError, match="unknown codec 'chanels'; did you mean 'channels'"):
        CODECS["chanels"]

    class Another(HalvedPairs):
        name = "channels"

    with pytest.raises(InputError, match="the codec 'channels' is taken"):
        CODECS.register(Another)
    with pytest.raises(InputError, match="2, 3, 4 or 8 bits"):
        Integers(Whole(4), 5, "token")  # type: ignore[arg-type]


def test_bytes_are_the_elements_in_order_whatever_the_strides() -> None:
    rows = torch.arange(6, dtype=torch.float32).view(2, 3)
    one = torch.ones(1).expand(4)[:1]  # of a head that drops a single channel: its stride is 0
    for tensor in (rows, rows.mT, rows[:, 1:], rows[:, :1], rows[:0], one, rows[0, 0], one.to(torch.bfloat16)):
        found = bytes_of(tensor).view(tensor.dtype).view(tensor.shape)
        assert torch.equal(found, tensor)
