"""One layer of a stored cache: which arrays it is made of, and how they are made and read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.compression.apply import for_prompt
from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole, stacked
from grace_opt.compression.plan import LayerPlan
from grace_opt.errors import InputError
from grace_opt.heads import KINDS, Kind

if TYPE_CHECKING:
    from grace_opt.graphs.observed import Observed

_AT_A_TIME = 1 << 18  # numbers that are encoded or decoded: they stay in the CPU's cache


@dataclass(frozen=True)
class Array:
    """The shape and dtype of a stored array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """As stored: a multiple of 8, so that every array begins at one."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 8) * 8


class LayerStore:
    """A layer of ``heads`` KV heads of ``dims`` channels, by its plan; without one it is stored whole.

    The sinks and the last ``recent_window`` tokens are whole, the tokens between them are rows of their codecs, packed
    where the codecs pack. Encoding and decoding are in float32.
    """

    def __init__(self, plan: LayerPlan | None, heads: int, dims: dict[Kind, int]) -> None:
        self.plan, self.heads, self.dims = plan, heads, dims
        self.groups: dict[Kind, list[Group]] = {
            kind: [] if plan is None or kind not in plan.codecs else groups_of(plan, kind, dims[kind]) for kind in KINDS
        }

    @property
    def fits(self) -> bool:
        """Whether read-outs are fitted to each prompt."""
        return any(group.fitted for groups in self.groups.values() for group in groups)

    def old(self, kind: Kind, tokens: int) -> slice:
        """The tokens that are not whole."""
        if self.plan is None or not self.groups[kind]:
            return slice(tokens, tokens)
        windows = self.plan.windows
        return slice(min(windows.sinks, tokens), max(min(windows.sinks, tokens), tokens - windows.recent_window))

    def arrays(self, rows: int, tokens: int, dtype: torch.dtype) -> list[Array]:
        """What the layer of ``rows`` prompts of ``tokens`` tokens is stored as, in order."""
        found = []
        for kind in KINDS:
            old = self.old(kind, tokens)
            count = old.stop - old.start
            found.append(Array((rows, self.heads, tokens - count, self.dims[kind]), dtype))
            for group in self.groups[kind] if count else ():
                found += group.arrays(rows, count, dtype)
        return found

    def encode(self, keys: Tensor, values: Tensor, dtype: torch.dtype, seen: Sequence[Observed]) -> Iterator[Tensor]:
        """The arrays of keys [B, H, T, n] and values [B, H, T, nv]; ``seen``: what each row's attention saw, if asked.

        O(tokens n), and O(tokens n^2) a head where read-outs are fitted. Raises InputError for numbers that are not
        finite, or that what holds them does not reach.
        """
        for kind, states in zip(KINDS, (keys, values), strict=True):
            old = self.old(kind, states.shape[2])
            yield torch.cat([states[:, :, : old.start], states[:, :, old.stop :]], dim=2).to(dtype)
            for group in self.groups[kind] if old.stop > old.start else ():
                yield from group.encode(states, old, dtype, seen)

    def decode(self, arrays: Iterator[Tensor], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of full width, of what `encode` gave. O(tokens n^2)."""
        both = []
        for kind in KINDS:
            old, whole = self.old(kind, tokens), next(arrays)
            states = torch.empty(*whole.shape[:2], tokens, whole.shape[3], dtype=dtype)
            states[:, :, : old.start] = whole[:, :, : old.start]
            states[:, :, old.stop :] = whole[:, :, old.start :]
            for group in self.groups[kind] if old.stop > old.start else ():
                group.decode(arrays, states, old)
            both.append(states)
        return both[0], both[1]


@dataclass(frozen=True, eq=False)
class Group:
    """KV heads of a layer whose codecs are of one signature.

    ``plan``: their part of the layer's; ``codec``: theirs as one, [1, heads, ..], float32, as far as the mask says it.
    """

    kind: Kind
    heads: Sequence[int]
    plan: LayerPlan
    codec: Codec

    @cached_property
    def where(self) -> Any:
        """The heads as an index; a slice, which copies nothing, where they lie side by side."""
        first, last = self.heads[0], self.heads[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.heads) else list(self.heads)

    @cached_property
    def fitted(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is fitted to each prompt for one head."""
        inner, recipe = getattr(self.codec, "inner", self.codec), self.plan.readout
        if recipe is None or recipe.readout_fit == "none" or not isinstance(inner, Channels):
            return {}
        if inner.constant is not None or inner.width == inner.n:
            return {}
        matrix = {} if recipe.readout_fit == "mean" else {"matrix": (inner.residual_width, inner.width)}
        return {**matrix, "constant": (inner.residual_width,)}

    def pieces(self, rows: int, old: slice) -> Iterator[slice]:
        """The old tokens, in pieces of whole blocks."""
        per = self.codec.block or 1
        step = max(1, _AT_A_TIME // (rows * len(self.heads) * self.codec.n * per)) * per
        yield from (slice(low, min(low + step, old.stop)) for low in range(old.start, old.stop, step))

    @cached_property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """What rows are read as: row @ matrix + constant, [1, h, width, n] and [1, h, 1, n]; None for whole rows.

        A product is faster than to read the dropped channels and put all of them in their places. Kept channels are
        multiplied by 1, and by zeros.
        """
        return _affine(self.codec)

    @cached_property
    def block(self) -> list[Array]:
        """What a block of one head is packed into."""
        zeros = torch.zeros(1, len(self.heads), 1, self.codec.block, self.codec.width)
        return [Array(tuple(each.shape[3:]), each.dtype) for each in self.codec.pack(zeros)]

    def arrays(self, rows: int, tokens: int, dtype: torch.dtype) -> list[Array]:
        """What so many old tokens are stored as."""
        lead = (rows, len(self.heads))
        found = [Array((*lead, *shape), _fine(dtype)) for shape in self.fitted.values()]
        if not self.codec.block:
            return [*found, Array((*lead, tokens, self.codec.width), dtype)]
        blocks = -(-tokens // self.codec.block)
        return [*found, *(Array((*lead, blocks, *each.shape), each.dtype) for each in self.block)]

    def encode(self, states: Tensor, old: slice, dtype: torch.dtype, seen: Sequence[Observed]) -> Iterator[Tensor]:
        """The arrays of the old tokens of all heads' states."""
        codec, states = self.codec, states[:, self.where]
        if self.fitted:
            rows = [(_of_heads(each, self.heads), True) for each in seen]
            found = _innermost(for_prompt(self.plan, rows, self.kind, states.float()))
            stored = {name: getattr(found, name).to(_fine(dtype)) for name in self.fitted}
            if not all(bool(each.isfinite().all()) for each in stored.values()):
                raise InputError(
                    f"the read-out of layer {self.plan.index} does not fit {dtype}; store the cache in float32"
                )
            yield from stored.values()
            codec = self._read_by(stored)
        parts: list[Sequence[Tensor]] = []
        for piece in self.pieces(len(states), old):
            kept = codec.encode(states[:, :, piece].float())
            parts.append(_packed(codec, kept) if codec.block else [kept.to(dtype)])
        yield from (torch.cat(each, dim=2) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))

    def decode(self, arrays: Iterator[Tensor], states: Tensor, old: slice) -> None:
        """Put the old tokens into all heads' states."""
        codec = self._read_by({name: next(arrays) for name in self.fitted})
        read = _affine(codec) if self.fitted else self.affine
        held = [next(arrays) for _ in (self.block if codec.block else (codec,))]
        per = codec.block or 1
        for piece in self.pieces(len(states), old):
            blocks = slice((piece.start - old.start) // per, -(-(piece.stop - old.start) // per))
            part = [each[:, :, blocks] for each in held]
            rows = codec.unpack(part, torch.float32).flatten(2, 3) if codec.block else part[0].float()
            rows = rows[:, :, : piece.stop - piece.start]
            if read is not None:
                matrix, constant = (each.expand(len(rows), -1, -1, -1).flatten(0, 1) for each in read)
                rows = torch.baddbmm(constant, rows.flatten(0, 1), matrix).view(*rows.shape[:3], -1)
            states[:, self.where, piece] = rows.to(states.dtype)

    def _read_by(self, fitted: dict[str, Tensor]) -> Codec:
        """The codec with what was fitted to a prompt."""
        if not fitted:
            return self.codec
        fields: dict[str, Any] = {name: each.float() for name, each in fitted.items()}
        inner = replace(_innermost(self.codec), **fields)
        return replace(self.codec, inner=inner) if hasattr(self.codec, "inner") else inner  # type: ignore[call-arg]


def groups_of(plan: LayerPlan, kind: Kind, n: int) -> list[Group]:
    """The KV heads of a layer by the signature of their codecs."""
    codecs = [codec.sized(n) for codec in plan.codecs[kind]]
    alike: dict[Any, list[int]] = {}
    for head, codec in enumerate(codecs):
        alike.setdefault(codec.signature(), []).append(head)
    found = []
    for heads in alike.values():
        together = stacked([codecs[head] for head in heads]).to(torch.empty(0, dtype=torch.float32))
        found.append(Group(kind, heads, plan.part(heads), together.mapped(lambda tensor: tensor[None])))
    return found


def _affine(codec: Codec) -> tuple[Tensor, Tensor] | None:
    """How a codec reads rows, which is affine in them, as a matrix and a constant."""
    if isinstance(_innermost(codec), Whole):
        return None
    exact = codec.mapped(lambda each: each.double() if each.is_floating_point() else each)
    lead = next(iter(codec.tensors().values())).shape[:2]
    zeros = torch.zeros(*lead, codec.width + 1, codec.width, dtype=torch.float64)
    zeros[:, :, 1:] = torch.eye(codec.width, dtype=torch.float64)
    read = exact.read(zeros, None)
    return (read[:, :, 1:] - read[:, :, :1]).float(), read[:, :, :1].float()


def _innermost(codec: Codec) -> Codec:
    return getattr(codec, "inner", codec)


def _fine(dtype: torch.dtype) -> torch.dtype:
    """Of read-outs that are fitted to a prompt: bfloat16 would be coarse."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _packed(codec: Codec, rows: Tensor) -> Sequence[Tensor]:
    """Rows [B, h, m, width] in blocks; the last is filled up with its last token."""
    missing = -rows.shape[2] % codec.block
    if missing:
        rows = torch.cat([rows, rows[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    return codec.pack(rows.view(*rows.shape[:2], -1, codec.block, rows.shape[3]))


def _of_heads(seen: Observed, heads: Sequence[int]) -> Observed:
    """What some KV heads saw, with the attention that was computed for all of them."""
    count, chosen = len(seen.keys), list(heads)
    part = replace(
        seen,
        queries=seen.queries.view(count, -1, *seen.queries.shape[1:])[chosen].flatten(0, 1),
        keys=seen.keys[chosen],
        values=seen.values[chosen],
        output=None,
        made={},
    )
    part.__dict__["token_weights"] = seen.token_weights[chosen]
    return part
