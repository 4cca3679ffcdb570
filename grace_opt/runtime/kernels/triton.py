"""Attention of one decoded token over a compressed cache in Triton: what is launched, and with what.

Importing this module needs Triton. Three launches: `triton_prepare` stores the token and turns the queries,
`triton_splits` reads the far tokens (split-KV, Flash-Decoding, Dao et al., 2023: one program reads a split of a KV head
for all of its query heads), and `triton_merge` the near ones, merges and applies read-outs. Nothing here waits for the
device, and nothing is recompiled as the cache grows.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from grace_opt.compression.tiles import BLOCK, padded, pieces
from grace_opt.runtime.kernels.triton_card import WARPS, Tiles, card_of, splits, tiles
from grace_opt.runtime.kernels.triton_codes import attend_codes
from grace_opt.runtime.kernels.triton_merge import merge
from grace_opt.runtime.kernels.triton_prepare import prepare
from grace_opt.runtime.kernels.triton_products import INTERPRETED
from grace_opt.runtime.kernels.triton_splits import attend_far

OLDEST = (3, 3)  # of Triton; 3.2 does not overlap loads with products
MOST_QUERIES = 64  # of a KV head: their sums are held in registers
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, eq=False)
class Codes:
    """The packed tokens of keys or values (`grace_opt.compression.tiles`), of a row from behind its sinks on.

    ``codes`` and ``scales``: [B, H, blocks, ..], contiguous; ``counts`` int32[B]: how many blocks a row has; ``bits``;
    ``head``: [B, H, S, d], contiguous, rows of the sinks of rows that have blocks. Equal counts of keys and values.
    """

    codes: Tensor
    scales: Tensor
    counts: Tensor
    bits: int
    head: Tensor


@dataclass(frozen=True, eq=False)
class Stored:
    """How one kind (keys or values) of B x H heads is stored.

    Attributes:
        rows: [B, H, capacity, pitch], floating-point, the last dimension contiguous: slot t's kept channels at
            ``rows[:, :, t - first_slot]``; what is beyond them in a row is zero.
        width: kept channels, d.
        ring: [B, H, size, e], residuals of the recent window: that of slot t at ``(t - base) % size``. Contiguous.
        base: see there.
        whole: [B, H, S, e], residuals of the sinks. Contiguous.
        order: int64[1 or B, H, d + e], the kept channels, then the others; None: as they are.
        matrix, constant: [1 or B, H, e, d] and [1 or B, H, e], the read-out; the others are constant + matrix x_A.
        new: [B, H, 1, d + e], the last token if it is to be stored; None if it is.
        first_slot: the slot of the first of the rows.
        codes: the packed tokens, if there are any.
    """

    rows: Tensor
    width: int
    ring: Tensor
    base: int
    whole: Tensor
    order: Tensor | None = None
    matrix: Tensor | None = None
    constant: Tensor | None = None
    new: Tensor | None = None
    first_slot: int = 0
    codes: Codes | None = None

    @property
    def rest(self) -> int:
        """e."""
        return self.whole.shape[3]

    @property
    def padded(self) -> int:
        """Channels that are read of a row: in 16 bits a multiple of 8, where the rows have room."""
        return min(-(-self.width // 8) * 8, self.rows.stride(2))

    @property
    def summed(self) -> int:
        """Channels that far tokens are summed in."""
        return self.padded if self.codes is None else padded(self.width)

    @property
    def block(self) -> int:
        """Channels of the block that a row is read as."""
        return _block(self.padded)


@dataclass(frozen=True)
class Whole:
    """Which tokens are whole: S sinks from each row's first slot on, and of the last ``recent`` slots those from
    ``begins`` on."""

    sinks: int
    recent: int
    begins: int = 0


def decode(
    query: Tensor,
    keys: Stored,
    values: Stored,
    length: int | Tensor,
    first: Tensor,
    whole: Whole,
    mask: Tensor | None,
    scaling: float,
    parts: int | None = None,
) -> Tensor:
    """Attention of the token in slot T - 1 over all T tokens: [B, H G, 1, dv + ev], in the query's dtype.

    Equal, up to rounding, to a softmax over all tokens of a row of the batch from its first one on, in which tokens
    that are not whole are read by their read-outs (`grace_opt.compression.codec`). Zeros where a query sees nothing.
    Sums are in float32. O(B H G T (dk + dv)).

    Args:
        query: [B, H G, 1, dk + ek], the dtype of what is stored.
        keys, values: on the query's device.
        length: T, the new token included; or an integer tensor of one element on the device, for buffers of a fixed
            size. What lies beyond T is not used.
        first: int64[B], each row's first slot; what is before it is not read.
        whole: which tokens are.
        mask: [B or 1, >= T], bool, true for a token that is seen, or floating-point, added to the scores. None: all.
        scaling: of the products.
        parts: how many parts the tokens are cut into; None: as many as fill the device.
    """
    batch, query_heads = query.shape[:2]
    heads = keys.rows.shape[1]
    group = query_heads // heads
    tile, near = tiles_of(keys, values)
    device = query.device
    on_device = isinstance(length, Tensor)
    if parts is None:
        held = keys.rows.shape[2] if isinstance(length, Tensor) else length
        parts = splits(batch * heads, held, card_of(device), tile)

    columns = max(8, 1 << (group - 1).bit_length())
    width = keys.padded + keys.rest
    asked = query.new_empty(batch * heads, width, columns)
    stats = torch.empty(batch * heads, parts, 2, columns, dtype=torch.float32, device=device)
    partial = torch.empty(batch * heads, parts, values.summed, columns, dtype=torch.float32, device=device)
    out = query.new_empty(batch, query_heads, 1, values.width + values.rest)
    if mask is not None:
        mask = mask if mask.stride(1) == 1 else mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    masking = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
    mask_stride = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    (k_unit, *k_strides), (v_unit, *v_strides) = _in_units(keys.rows), _in_units(values.rows)
    shapes: dict[str, Any] = {
        "ON_DEVICE": on_device,
        "ASKED": width,
        "G": columns,
        "enable_fp_fusion": True,
        "K_WIDTH": keys.padded,
        "K_PITCH": keys.rows.stride(2),
        "DK": keys.block,
        "V_WIDTH": values.padded,
        "V_PITCH": values.rows.stride(2),
        "DV": values.block,
    }
    rests = {"EK": _block(keys.rest), "EV": _block(values.rest), "K_REST": keys.rest, "V_REST": values.rest}
    with torch.cuda.device(device) if query.is_cuda else nullcontext():
        prepare[(batch * heads, 2)](
            *(query, query.stride(0), query.stride(1), asked),
            *_to_store(keys),
            *_to_store(values),
            *(length, keys.first_slot, heads),
            GROUP=group,
            K_KEPT=keys.width,
            V_KEPT=values.width,
            num_warps=max(_warps(keys), _warps(values)),
            **shapes,
            **rests,
        )
        where = (first, mask, mask_stride)
        if keys.codes is None or values.codes is None:
            attend_far[(batch * heads, parts)](
                *(asked, keys.rows, *k_strides, values.rows, *v_strides),
                *(*where, length, stats, partial, scaling * _LOG2_E, keys.first_slot),
                *(heads, whole.sinks, whole.recent, whole.begins),
                MASK=masking,
                K_UNIT=k_unit,
                V_UNIT=v_unit,
                N=tile.tokens,
                STAGES=tile.stages,
                num_warps=WARPS,
                **shapes,
            )
            packed: tuple[Any, ...] = (None, None, None)
        else:
            large, small = pieces(keys.summed)
            attend_codes[(batch * heads, parts)](
                *(asked, keys.codes.codes, keys.codes.scales, values.codes.codes, values.codes.scales),
                *(keys.codes.codes.shape[2], keys.codes.counts),
                *(*where, stats, partial, scaling * _LOG2_E, heads, whole.sinks),
                MASK=masking,
                ASKED=width,
                K_WIDTH=keys.padded,
                K_BITS=keys.codes.bits,
                V_BITS=values.codes.bits,
                G=columns,
                W=tile.tokens // BLOCK,
                D0=large,
                D1=small,
                E=values.summed,
                STAGES=tile.stages,
                num_warps=tile.tokens // BLOCK,
                # Left to itself, ptxas spills to fit four programs of 4 bits on a multiprocessor.
                maxnreg=168 if keys.codes.bits == values.codes.bits == 4 else None,
                enable_fp_fusion=True,
            )
            packed = (keys.codes.head, values.codes.head, keys.codes.counts)
        merge[(batch * heads,)](
            *(stats, partial, parts, asked),
            *(keys.rows, *k_strides, *_near(keys)),
            *(values.rows, *v_strides, *_near(values)),
            *_of_heads(values.order),
            *_of_heads(values.matrix),
            *_of_heads(values.constant),
            *packed,
            *(*where, length, out, scaling * _LOG2_E),
            *(keys.first_slot, heads, whole.sinks, whole.recent, whole.begins),
            MASK=masking,
            GROUP=group,
            K_KEPT=keys.width,
            K_UNIT=k_unit,
            V_KEPT=values.width,
            V_UNIT=v_unit,
            P_WIDTH=values.summed,
            SINKS=whole.sinks > 0,
            TILE=tile.tokens,
            N=near.tokens,
            CHUNK=max(1, 64 // columns),
            num_warps=max(_warps(keys), _warps(values)),
            num_stages=near.stages,
            **shapes,
            **rests,
        )
    return out


def compiled_decode(
    query: Tensor,
    keys: Stored,
    values: Stored,
    length: int | Tensor,
    first: Tensor,
    whole: Whole,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """`decode` as one operation that torch.compile does not look into."""
    sides = []
    for side in (keys, values):
        sides += [side.rows, side.width, side.ring, side.base, side.whole, side.order, side.matrix, side.constant]
        sides.append(side.new)
    found: Tensor = _decode(query, *sides, length, first, whole.sinks, whole.recent, whole.begins, mask, scaling)
    return found


@torch.library.custom_op("grace_opt::decode", mutates_args=("k", "k_ring", "v", "v_ring"))
def _decode(
    query: Tensor,
    k: Tensor,
    k_width: int,
    k_ring: Tensor,
    k_base: int,
    k_whole: Tensor,
    k_order: Tensor | None,
    k_matrix: Tensor | None,
    k_constant: Tensor | None,
    k_new: Tensor | None,
    v: Tensor,
    v_width: int,
    v_ring: Tensor,
    v_base: int,
    v_whole: Tensor,
    v_order: Tensor | None,
    v_matrix: Tensor | None,
    v_constant: Tensor | None,
    v_new: Tensor | None,
    length: Tensor,
    first: Tensor,
    sinks: int,
    recent: int,
    begins: int,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    keys = Stored(k, k_width, k_ring, k_base, k_whole, k_order, k_matrix, k_constant, k_new)
    values = Stored(v, v_width, v_ring, v_base, v_whole, v_order, v_matrix, v_constant, v_new)
    return decode(query, keys, values, length, first, Whole(sinks, recent, begins), mask, scaling)


@_decode.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    v_width, v_whole = arguments[10], arguments[13]
    return query.new_empty(*query.shape[:3], v_width + v_whole.shape[3])


def missing(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor's device; None if they can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"it needs Triton {'.'.join(map(str, OLDEST))} or newer, and this is {triton.__version__}"
    if INTERPRETED:
        return None
    if not tensor.is_cuda:
        return "it runs on cards"
    if torch.version.hip is not None:
        return "it was not tried on ROCm yet"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "it runs on cards of compute capability 8.0 or higher"
    return None


def too_wide(keys: Stored, values: Stored) -> str | None:
    """Why tiles of these rows do not fit this device; None if they do."""
    shared = card_of(keys.rows.device).program_shared
    if None in _tiles(keys, values):
        return f"16 tokens of rows this wide do not fit the {shared} bytes of shared memory of this card"
    return None


def tiles_of(keys: Stored, values: Stored) -> tuple[Tiles, Tiles]:
    """How far and near tokens are read. Asked only where `too_wide` has no objection."""
    far, near = _tiles(keys, values)
    assert far is not None
    assert near is not None
    return far, near


def _tiles(keys: Stored, values: Stored) -> tuple[Tiles | None, Tiles | None]:
    shared, size = card_of(keys.rows.device).program_shared, keys.rows.element_size()
    rest = _block(keys.rest) + _block(values.rest)
    near = 32 if size == 2 else 16  # products in float32 hold their factors in registers
    far = tiles((keys.block + values.block) * size, shared)
    if keys.codes is not None and values.codes is not None:
        held = [each for side in (keys.codes, values.codes) for each in (side.codes, side.scales)]
        block = sum(each.stride(2) * each.element_size() for each in held)
        ways = [Tiles(warps * BLOCK, stages, warps * block) for warps in (4, 2) for stages in (3, 2)]
        far = next((each for each in ways if each.shared <= shared), None)
    return far, tiles((keys.block + values.block + rest) * size, shared, near, 2)


def _block(width: int) -> int:
    """Of the block that so many channels are read as, no less than a product takes; 0 for none."""
    return max(16, 1 << (width - 1).bit_length()) if width else 0


def _warps(stored: Stored) -> int:
    """Of a program that has a whole read-out in registers: 4 KiB of it a warp."""
    nbytes = stored.block * _block(stored.rest) * stored.rows.element_size()
    return min(16, max(WARPS, 1 << max(0, nbytes // 4096 - 1).bit_length()))


def _in_units(rows: Tensor) -> tuple[int, int, int]:
    """A unit in elements, and the strides of the batch and the heads in it.

    A stride that Triton may not specialise on could be odd for all it knows, and its loads would be of one element. The
    unit is part of the kernel: the largest power of two that divides the strides, 16 bytes at most.
    """
    strides = [rows.stride(i) if rows.shape[i] > 1 else 0 for i in range(2)]
    unit = math.gcd(16 // rows.element_size(), *strides)
    return unit, strides[0] // unit, strides[1] // unit


def _of_heads(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor [1 or B, H, ..] with the strides of the batch and the heads."""
    if tensor is None:
        return None, 0, 0
    tensor = tensor if tensor[0, 0].is_contiguous() else tensor.contiguous()
    return tensor, 0 if len(tensor) == 1 else tensor.stride(0), tensor.stride(1)


def _near(stored: Stored) -> tuple[Any, ...]:
    """What `merge` is told of residuals."""
    return stored.ring, stored.base, max(1, stored.ring.shape[2]), stored.whole


def _to_store(stored: Stored) -> tuple[Any, ...]:
    """What `prepare` is told of keys or values."""
    return (
        *_of_heads(stored.new),
        *_of_heads(stored.rows),
        *(stored.ring, stored.base, max(1, stored.ring.shape[2])),
        *_of_heads(stored.order),
        *_of_heads(stored.matrix),
        *_of_heads(stored.constant),
    )
