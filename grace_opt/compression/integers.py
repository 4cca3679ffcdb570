"""Key and value channels as packed integers of 2, 3, 4 or 8 bits, with a scale and a zero for each group.

The layout is that of KIVI (Liu et al., 2024, arXiv 2402.02750, section 3): keys in groups of tokens within a channel,
because outliers of keys sit in few channels; values in groups of channels within a token. It differs in two ways: the
last group of a row may be shorter (KIVI keeps such tokens whole), and 3 bits take three eighths of a byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor

from grace_opt.compression.codec import Codec
from grace_opt.errors import InputError
from grace_opt.heads import Kind

Bits = Literal[2, 3, 4, 8]
Axis = Literal["channel", "token"]
AXES: dict[Kind, Axis] = {"key": "channel", "value": "token"}  # of the scales
GROUP = 32  # tokens of a block, and elements that share a scale

_LIMIT = 65504.0  # the largest float16
_UNREACHABLE = (
    "keys or values to quantise are not finite or beyond 65504, which float16 scales cannot reach; leave this layer "
    "unquantised"
)
_LARGE = 1 << 15  # elements from which on compiled loops are worth loading


@dataclass(frozen=True, eq=False)
class Integers(Codec):
    """The rows of another codec as packed integers, in blocks of 32 tokens.

    Residuals of whole tokens are those of the exact row, so the newest tokens, which are not packed yet, are exact.
    """

    inner: Codec
    bits: Bits
    axis: Axis

    name: ClassVar[str] = "integers"

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise InputError(f"packed integers have 2, 3, 4 or 8 bits, got {self.bits}")
        if self.axis not in get_args(Axis):
            raise InputError(f"the axis of packed integers must be channel or token, got {self.axis!r}")
        if isinstance(self.inner, Integers):
            raise InputError("packed integers cannot be packed once more; give the codec whose rows they are")

    @property
    def n(self) -> int:
        return self.inner.n

    @property
    def width(self) -> int:
        return self.inner.width

    @property
    def heads(self) -> int:
        return self.inner.heads

    @property
    def residual_width(self) -> int:
        return self.inner.residual_width

    @property
    def block(self) -> int:
        return GROUP

    def sized(self, n: int) -> Self:
        return replace(self, inner=self.inner.sized(n))

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)

    def residual(self, x: Tensor, z: Tensor) -> Tensor:
        return self.inner.residual(x, z)

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.asked(query)

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        return self.inner.read(total, residual)

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        packed = quantise(z, self.bits, self.axis, GROUP)
        return packed.codes, packed.scale, packed.zero

    def unpack(self, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale, zero = held
        shape = torch.Size([*codes.shape[:-2], GROUP, self.width])
        return Packed(codes, scale, zero, shape, dtype, self.bits, self.axis, GROUP).unpack()

    def stored(self, z: Tensor) -> Tensor:
        return rounded(z, self.bits, self.axis, GROUP)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        lines = self.width if self.axis == "channel" else GROUP
        groups = 1 if self.axis == "channel" else math.ceil(self.width / GROUP)
        length = GROUP if self.axis == "channel" else self.width
        block = lines * (math.ceil(length * self.bits / 8) + 4 * groups)
        return tokens // GROUP * block + tokens % GROUP * self.width * itemsize


def as_integers(codec: Codec, bits: int, kind: Kind) -> Codec:
    """The codec of keys or values with its rows held in so many bits; 0: as they are. Raises InputError."""
    inner = without_integers(codec)
    return Integers(inner, cast(Bits, bits), AXES[kind]) if bits else inner


def without_integers(codec: Codec) -> Codec:
    """The codec whose rows are held, as they come or as integers."""
    return codec.inner if isinstance(codec, Integers) else codec


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor [..., T, d] as integers. A row is L = T tokens of a channel (axis ``channel``: R = d rows), or L = d
    channels of a token (axis ``token``: R = T rows); it has G = ceil(L / group) groups, the last maybe shorter.

    Attributes:
        codes: uint8[..., R, ceil(L bits / 8)]. Code i of a row is its bits ``i bits`` to ``(i + 1) bits - 1``, counted
            from the lowest bit of the first byte; what is left of the row's last byte, at most 7 bits, is zero.
        scale, zero: float16[..., R, G], or bfloat16 for a bfloat16 tensor. An element is zero + scale * code.
        shape, dtype: of the tensor that was packed.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    shape: torch.Size
    dtype: torch.dtype
    bits: Bits
    axis: Axis
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(each.numel() * each.element_size() for each in (self.codes, self.scale, self.zero))

    def levels(self) -> Tensor:
        """uint8[..., R, L]: the codes, one an element."""
        return _unpack(self.codes, self.bits, self.shape[-2 if self.axis == "channel" else -1]).to(torch.uint8)

    def unpack(self) -> Tensor:
        """The tensor in its original shape and dtype, contiguous; see `quantise` for the error. O(elements)."""
        length = self.shape[-2 if self.axis == "channel" else -1]
        scale, zero = self.scale.float(), self.zero.float()
        if self.dtype == torch.float32 and _is_compiled(self.codes, self.shape.numel()):
            from grace_opt.compression import integers_cpu

            x = torch.empty(self.shape)
            unpack = integers_cpu.channel_values if self.axis == "channel" else integers_cpu.token_values
            unpack(*map(_blocks, (self.codes, zero, scale)), self.bits, self.group, _LIMIT, _blocks(x))
            return x
        if scale.shape[-1] > 1:
            scale, zero = (each.repeat_interleave(self.group, dim=-1)[..., :length] for each in (scale, zero))
        # The scale is rounded up, so the topmost code of a group may lie just above the largest float16.
        rows = _unpack(self.codes, self.bits, length).float().mul_(scale).add_(zero)
        rows = rows.clamp_(-_LIMIT, _LIMIT).to(self.dtype)
        return (rows.mT if self.axis == "channel" else rows).contiguous()


def quantise(x: Tensor, bits: Bits, axis: Axis, group: int = 32, waits: bool = True) -> Packed:
    """Asymmetric min-max integers of x [..., T, d], a floating-point tensor on any device. O(elements), vectorised.

    A group's zero is its minimum rounded down to the stored dtype, its scale (maximum - zero) / (2^bits - 1) rounded
    up, and its codes are made with these two. So all of the group lies within what the codes reach, and no element is
    clamped by more than rounding: ``unpack`` is off by at most scale / 2, plus 2^-21 of the group's largest magnitude
    for the arithmetic in float32, plus the rounding to x's dtype. The scale is at most (maximum - minimum + one ulp of
    the zero) / (2^bits - 1), rounded up. A group of equal elements comes back exactly if float16 (bfloat16 for
    bfloat16) holds its value, and within scale / 2, a fraction of an ulp of it, if not.

    ``waits``: whether the host may wait for the device; if not, the device fails where InputError would be raised.

    Raises:
        InputError: for elements that are not finite or beyond float16's 65504; for a tensor of integers or of fewer
            than two dimensions; for other bits or axes; for an empty group.
    """
    _check(x, bits, axis, group)
    if _is_compiled(x, x.numel()) and x.dtype == torch.float32:
        return _quantised(x.contiguous(), bits, axis, group)
    along = _along(axis)
    codes, scale, zero = _coded(x, bits, along, group, waits)
    packed = _pack(codes.flatten(along - 1, along).narrow(along, 0, x.shape[along]).to(torch.uint8), bits, along)
    scale, zero = scale.squeeze(along), zero.squeeze(along)
    if axis == "channel":
        packed, scale, zero = (each.mT.contiguous() for each in (packed, scale, zero))
    return Packed(packed, scale, zero, x.shape, x.dtype, bits, axis, group)


def rounded(x: Tensor, bits: Bits, axis: Axis, group: int = 32) -> Tensor:
    """What `quantise` and `unpack` make of x, to the bit, and nothing is packed. Raises InputError as `quantise`."""
    _check(x, bits, axis, group)
    along = _along(axis)
    codes, scale, zero = _coded(x, bits, along, group)
    back = codes.mul_(scale.float()).add_(zero.float()).clamp_(-_LIMIT, _LIMIT)
    return back.flatten(along - 1, along).narrow(along, 0, x.shape[along]).to(x.dtype)


def _check(x: Tensor, bits: Bits, axis: Axis, group: int) -> None:
    if bits not in get_args(Bits):
        raise InputError(f"packed integers have 2, 3, 4 or 8 bits, got {bits}")
    if axis not in get_args(Axis):
        raise InputError(f"the axis of a quantisation group must be 'channel' or 'token', got {axis!r}")
    if group < 1:
        raise InputError(f"a quantisation group needs at least 1 element, got {group}")
    if x.dim() < 2 or not x.is_floating_point():
        raise InputError(
            f"only floating-point tensors [..., tokens, channels] can be quantised, got {x.dtype}{list(x.shape)}"
        )


def _along(axis: Axis) -> int:
    """The dimension of [..., T, d] that groups run along."""
    return -2 if axis == "channel" else -1


def _coded(x: Tensor, bits: Bits, along: int, group: int, waits: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, float32[..., G, group, d] along -2, [..., T, G, group] along -1; scales and zeros, with 1 in place of the
    group. Left as x lies: to transpose codes is cheaper than to transpose numbers."""
    length = x.shape[along]
    count = math.ceil(length / group)
    numbers = x.detach().float()
    if missing := count * group - length:
        # The last group is filled up with its own last element, which changes neither its minimum nor its maximum.
        shape = [*x.shape]
        shape[along] = missing
        numbers = torch.cat([numbers, numbers.narrow(along, length - 1, 1).expand(shape)], dim=along)
    groups = torch.unflatten(numbers, along, (count, group))
    low, high = groups.amin(along, keepdim=True), groups.amax(along, keepdim=True)
    _refuse_unreachable(((low >= -_LIMIT) & (high <= _LIMIT)).all(), waits)  # false for NaN too
    stored = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    scale, zero = _scales(low, high, bits, stored)
    # A scale of 0 belongs to a group of elements that all equal its zero: any divisor makes their codes 0.
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    return (groups - zero.float()).div_(divisor).round_().clamp_(0, 2**bits - 1), scale, zero


def _scales(low: Tensor, high: Tensor, bits: int, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups with these extremes, float32, as they are stored."""
    zero = -_round_up(-low, stored)
    return _round_up((high - zero.float()) / (2**bits - 1), stored), zero


def _refuse_unreachable(reached: Tensor, waits: bool) -> None:
    """Raise InputError if false; where the host does not wait, the device fails with the same sentence."""
    if torch.compiler.is_compiling() or not waits:
        torch._assert_async(reached, _UNREACHABLE)
    elif not bool(reached):
        raise InputError(_UNREACHABLE)


def _is_compiled(x: Tensor, elements: int) -> bool:
    """Whether loops that numba compiles take it: a third of the time of torch's operations, and the same bits."""
    return (
        elements >= _LARGE
        and x.device.type == "cpu"
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def _quantised(x: Tensor, bits: Bits, axis: Axis, group: int) -> Packed:
    """`quantise` of a large float32 tensor on a CPU."""
    from grace_opt.compression import integers_cpu

    *lead, tokens, width = x.shape
    rows, length = (width, tokens) if axis == "channel" else (tokens, width)
    low, high = (torch.empty(*lead, rows, math.ceil(length / group)) for _ in range(2))
    codes = torch.empty(*lead, rows, math.ceil(length * bits / 8), dtype=torch.uint8)
    by_channel = axis == "channel"
    extremes = integers_cpu.channel_extremes if by_channel else integers_cpu.token_extremes
    if extremes(_blocks(x), group, _blocks(low), _blocks(high)):
        raise InputError(_UNREACHABLE)
    scale, zero = _scales(low, high, bits, torch.float16)
    pack = integers_cpu.channel_codes if by_channel else integers_cpu.token_codes
    pack(_blocks(x), _blocks(zero.float()), _blocks(scale.float()), bits, group, _blocks(codes))
    return Packed(codes, scale, zero, x.shape, x.dtype, bits, axis, group)


def _blocks(x: Tensor) -> Any:
    """As numpy's array of three dimensions."""
    return x.detach().reshape(-1, *x.shape[-2:]).contiguous().numpy()


def bits_per_element(packed: Packed) -> float:
    """Bits held for an element, scales and zeros included; 0 for an empty tensor."""
    return 8 * packed.nbytes / max(1, packed.shape.numel())


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, float32, in float16 or bfloat16, never below x. By its bits: torch.nextafter lacks float16 on some devices."""
    near = x.to(dtype)
    code = near.view(torch.int16)  # sign and magnitude; -0 is never below x, so no step starts there
    step = torch.where(code < 0, -1, 1) * (near.float() < x)
    return (code + step).to(torch.int16).view(dtype)


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that ends at a byte's end: (8, 3) for 3 bits, (4, 1) for 2."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _pack(codes: Tensor, bits: int, along: int = -1) -> Tensor:
    """uint8 below 2^bits, L along a dimension -> uint8, ceil(L bits / 8) there, in a storage of just that size."""
    per, size = _unit(bits)
    length = codes.shape[along]
    units = math.ceil(length / per)
    if missing := units * per - length:
        codes = torch.nn.functional.pad(codes, (0, 0) * (-1 - along) + (0, missing))
    # Codes of 2, 4 and 8 bits make single bytes, and need no wider words.
    each = torch.unflatten(codes, along, (units, per)).to(torch.uint8 if size == 1 else torch.int32).unbind(along)
    words = each[0]
    for i in range(1, per):
        words = words | each[i] << bits * i
    if size == 1:
        return words.contiguous()
    parts = torch.stack([(words >> 8 * i) & 255 for i in range(size)], dim=along).to(torch.uint8)
    packed: Tensor = parts.flatten(along - 1, along).narrow(along, 0, math.ceil(length * bits / 8))
    return packed.clone(memory_format=torch.contiguous_format)


def _unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `_pack`: integers[..., length]."""
    per, size = _unit(bits)
    if size == 1:  # codes do not cross bytes
        each = [(packed >> bits * i) & (2**bits - 1) for i in range(per)] if per > 1 else [packed]
        return torch.stack(each, dim=-1).flatten(-2)[..., :length]
    units = math.ceil(length / per)
    missing = units * size - packed.shape[-1]
    padded = torch.nn.functional.pad(packed, (0, missing)).int().view(*packed.shape[:-1], units, size)
    words = (padded << 8 * torch.arange(size, device=packed.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    split = words[..., None] >> bits * torch.arange(per, device=packed.device, dtype=torch.int32)
    codes: Tensor = split & (2**bits - 1)
    return codes.flatten(-2)[..., :length]
