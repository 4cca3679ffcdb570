"""One layer of a stored cache: which arrays it is made of, and how they are made and read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.compression.apply import for_prompt
from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, stacked
from grace_opt.compression.plan import LayerPlan
from grace_opt.errors import InputError
from grace_opt.heads import KINDS, Kind

if TYPE_CHECKING:
    from grace_opt.graphs.observed import Observed

_STEP = 1 << 12  # tokens that are encoded or decoded at a time, a multiple of all blocks: they stay in the CPU's cache


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
        self.groups: dict[Kind, list[tuple[list[int], LayerPlan, Codec]]] = {
            kind: [] if plan is None or kind not in plan.codecs else list(_grouped(plan, kind, dims[kind]))
            for kind in KINDS
        }

    @property
    def fits(self) -> bool:
        """Whether read-outs are fitted to each prompt."""
        return any(_fitted(part, codec) for groups in self.groups.values() for _, part, codec in groups)

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
            for heads, part, codec in self.groups[kind] if count else ():
                lead = (rows, len(heads))
                found += [Array((*lead, *shape), _fine(dtype)) for shape in _fitted(part, codec).values()]
                found += [Array((*lead, *shape), held) for shape, held in _held(codec, count, dtype)]
        return found

    def encode(self, keys: Tensor, values: Tensor, dtype: torch.dtype, seen: Sequence[Observed]) -> Iterator[Tensor]:
        """The arrays of keys [B, H, T, n] and values [B, H, T, nv]; ``seen``: what each row's attention saw, if asked.

        O(tokens), and O(tokens n^2) a head where read-outs are fitted.
        """
        for kind, states in zip(KINDS, (keys, values), strict=True):
            old = self.old(kind, states.shape[2])
            yield torch.cat([states[:, :, : old.start], states[:, :, old.stop :]], dim=2).to(dtype)
            for heads, part, template in self.groups[kind] if old.stop > old.start else ():
                tokens = states[:, heads, old] if len(heads) < self.heads else states[:, :, old]
                codec = template
                if fitted := _fitted(part, template):
                    rows = [(_of_heads(each, heads), True) for each in seen]
                    inner = for_prompt(part, rows, kind, states[:, heads].float())
                    inner = getattr(inner, "inner", inner)
                    stored = {name: getattr(inner, name).to(_fine(dtype)) for name in fitted}
                    if not all(bool(each.isfinite().all()) for each in stored.values()):
                        raise InputError(
                            f"the read-out of layer {part.index} does not fit {dtype}; store the cache in float32"
                        )
                    yield from stored.values()
                    codec = _with(template, {name: each.float() for name, each in stored.items()})
                yield from _packed(codec, tokens, dtype)

    def decode(self, arrays: Iterator[Tensor], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of full width, of what `encode` gave."""
        both = []
        for kind in KINDS:
            old = self.old(kind, tokens)
            whole = next(arrays)
            if old.stop == old.start:
                both.append(whole.to(dtype))
                continue
            states = torch.empty(*whole.shape[:2], tokens, whole.shape[3], dtype=dtype)
            states[:, :, : old.start] = whole[:, :, : old.start]
            states[:, :, old.stop :] = whole[:, :, old.start :]
            for heads, part, template in self.groups[kind]:
                codec = template
                if fitted := _fitted(part, template):
                    codec = _with(template, {name: next(arrays).float() for name in fitted})
                held = [next(arrays) for _ in _held(codec, 1, dtype)]
                at = old.start
                for piece in _unpacked(codec, held, old.stop - old.start):
                    to = slice(at, at + piece.shape[2])
                    if len(heads) < self.heads:
                        states[:, heads, to] = piece.to(dtype)
                    else:
                        states[:, :, to] = piece
                    at = to.stop
            both.append(states)
        return both[0], both[1]


def _grouped(plan: LayerPlan, kind: Kind, n: int) -> Iterator[tuple[list[int], LayerPlan, Codec]]:
    """KV heads whose codecs are alike, their part of the plan, and their codecs as one, [1, heads, ..] in float32."""
    codecs = [codec.sized(n) for codec in plan.codecs[kind]]
    groups: dict[Any, list[int]] = {}
    for head, codec in enumerate(codecs):
        groups.setdefault(codec.signature(), []).append(head)
    for heads in groups.values():
        together = stacked([codecs[head] for head in heads]).to(torch.empty(0, dtype=torch.float32))
        yield heads, plan.part(heads), together.mapped(lambda tensor: tensor[None])


def _fitted(plan: LayerPlan, codec: Codec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is fitted to each prompt for one head."""
    inner = getattr(codec, "inner", codec)
    recipe = plan.readout
    if recipe is None or recipe.readout_fit == "none" or not isinstance(inner, Channels):
        return {}
    if inner.constant is not None or inner.width == inner.n:
        return {}
    matrix = {} if recipe.readout_fit == "mean" else {"matrix": (inner.residual_width, inner.width)}
    return {**matrix, "constant": (inner.residual_width,)}


def _with(codec: Codec, fields: dict[str, Any]) -> Codec:
    """The codec with fields of the innermost one replaced."""
    inner = getattr(codec, "inner", None)
    return replace(codec, **fields) if inner is None else replace(codec, inner=replace(inner, **fields))  # type: ignore[call-arg]


def _fine(dtype: torch.dtype) -> torch.dtype:
    """Of read-outs that are fitted to a prompt: bfloat16 would be coarse."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _of_heads(seen: Observed, heads: list[int]) -> Observed:
    """What some KV heads saw, with the attention that was computed for all of them."""
    count = len(seen.keys)
    part = replace(
        seen,
        queries=seen.queries.view(count, -1, *seen.queries.shape[1:])[heads].flatten(0, 1),
        keys=seen.keys[heads],
        values=seen.values[heads],
        output=None,
        graphs={},
    )
    part.__dict__["token_weights"] = seen.token_weights[heads]
    return part


def _held(codec: Codec, tokens: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what so many tokens of one head are held as."""
    if not codec.block:
        return [((tokens, codec.width), dtype)]
    blocks = -(-tokens // codec.block)
    lead = next(iter(codec.tensors().values())).shape[:2] if codec.tensors() else (1, 1)
    like = codec.pack(torch.zeros(*lead, 1, codec.block, codec.width))
    return [((blocks, *each.shape[3:]), each.dtype) for each in like]


def _packed(codec: Codec, tokens: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tokens [B, h, m, n] as they are held; a last block is filled up with its last token."""
    parts: list[Sequence[Tensor]] = []
    for low in range(0, tokens.shape[2], _STEP):
        rows = codec.encode(tokens[:, :, low : low + _STEP].float())
        if not codec.block:
            parts.append([rows.to(dtype)])
            continue
        missing = -rows.shape[2] % codec.block
        if missing:
            rows = torch.cat([rows, rows[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
        parts.append(codec.pack(rows.view(*rows.shape[:2], -1, codec.block, rows.shape[3])))
    return [torch.cat(each, dim=2) for each in zip(*parts, strict=True)]


def _unpacked(codec: Codec, held: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """The tokens [B, h, <= _STEP, n] that these were made of, as they are read back."""
    per = codec.block or 1
    for low in range(0, tokens, _STEP):
        count = min(_STEP, tokens - low)
        part = [each[:, :, low // per : -(-(low + count) // per)] for each in held]
        rows = codec.unpack(part, torch.float32).flatten(2, 3) if codec.block else part[0].float()
        yield codec.read(rows[:, :, :count], None)
