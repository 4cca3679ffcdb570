"""What a codec does: how the tokens of a KV head are stored, and how attention reads them from what is stored.

A codec stores a token x, float[n], as a row z of ``width`` numbers, and reads it back as x~, affine in z. A *whole*
token (a sink, or one of the recent window) holds a residual r beside its row, so that nothing of it is lost:

    q.x  = q_z.z + q_r.r + something that is the same for all tokens of a query     where q_z, q_r = asked(q)
    sum p x = read(sum p z, sum p r)                                               for weights p that sum to 1

A token that is not whole has r = 0. So one formula serves every token, one softmax spans them all, and nothing is ever
decoded to its full width before attention.

Two kinds of codecs differ. One row may be of several KV heads (`Codec.heads`): then x, queries, residuals and what is
read are by head, [.., H, m, n], and z is [.., 1, m, width]. And keys may be stored before RoPE (`Codec.before_rope`):
scores of these need the token's position, so old keys are read back, some at a time, and turned to it; residuals are
still of keys as attention meets them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from grace_opt.heads import Kind

if TYPE_CHECKING:
    from grace_opt.graphs.observed import Observed


@dataclass(frozen=True, eq=False)
class Codec(ABC):
    """The codec of one KV head, or of several alike (their tensors side by side in leading dimensions).

    A subclass is a frozen dataclass. Its fields are tensors (with the leading dimensions [..] of the heads, and of the
    rows of a batch where each has its own), another codec, or parameters that JSON can hold. Its methods broadcast over
    leading dimensions: x [.., m, n], z [.., m, width], r [.., m, residual_width].

    Attributes:
        name: in `CODECS` and in mask files.
        selects: whether its heads' channels are chosen by a solver (`Channels`); if not, `fit` makes it.
        spectral: whether `spectrum` says how a budget is shared over layers.
        before_rope: whether keys are given to it as they are before RoPE.
    """

    name: ClassVar[str]
    selects: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    before_rope: ClassVar[bool] = False

    @property
    @abstractmethod
    def n(self) -> int:
        """Channels of a whole token."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of a stored row."""

    @property
    def heads(self) -> int:
        """How many KV heads share a row: 1, or all of a layer."""
        return 1

    @property
    def residual_width(self) -> int:
        """Numbers that a whole token holds beside its row."""
        return self.n

    @property
    def block(self) -> int:
        """How many tokens are packed together; 0: rows are held as they are, in the cache's dtype."""
        return 0

    @classmethod
    def fit(cls, seen: Observed, kind: Kind, widths: Sequence[int], **options: Any) -> list[Self]:
        """The codecs of a layer's KV heads, of these widths, for what its attention saw; one, if they share rows.

        ``options`` are the method's ``codec_options``. Raises InputError for what it cannot do.
        """
        raise NotImplementedError(f"{cls.__name__} is not fitted to tokens")

    @classmethod
    def spectrum(cls, seen: Observed, kind: Kind, **options: Any) -> Tensor:
        """What each number of a row of all heads saves of the squared error, float64[H n], the most first, of a sum of
        1."""
        raise NotImplementedError(f"{cls.__name__} has no spectrum")

    @classmethod
    def looks_at_inputs(cls, **options: Any) -> bool:
        """Whether `fit` asks for `Observed.inputs`."""
        return False

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Rows z [.., m, width] of tokens x [.., m, n]."""

    def residual(self, x: Tensor, z: Tensor) -> Tensor:
        """What whole tokens x hold beside their rows z: [.., m, residual_width]."""
        return x - self.read(z, None)

    @abstractmethod
    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [.., m, n] as they meet rows [.., m, width], and residuals [.., m, residual_width]."""

    @abstractmethod
    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        """[.., m, n] from sums over rows with weights that sum to 1, and over whole tokens' residuals (None: none)."""

    def sized(self, n: int) -> Self:
        """For tokens of n channels, if that was left open."""
        return self

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Rows [.., block, width] as they are held, tensors [.., *]; only where ``block`` is not 0."""
        raise NotImplementedError

    def unpack(self, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The rows [.., block, width] that `pack` made these of."""
        raise NotImplementedError

    def stored(self, z: Tensor) -> Tensor:
        """Rows [.., m, width] as they come back from the cache."""
        return z

    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Bytes that this many stored tokens of one head take in a cache of this item size; packed blocks are whole."""
        return tokens * self.width * itemsize

    def parameters(self) -> dict[str, Any]:
        """The fields that are no tensors and no codecs."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in held.items() if not isinstance(value, Tensor | Codec) and value is not None
        }

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor; those of a codec inside are named ``inner.*``."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, Codec):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.tensors().items()}
        return found

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same codec with every tensor changed."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, Codec):
                changed[field.name] = value.mapped(change)
        return replace(self, **changed)

    def to(self, like: Tensor) -> Self:
        """On the device of ``like``, floating-point tensors in its dtype."""
        return self.mapped(lambda each: each.to(like.device, like.dtype if each.is_floating_point() else each.dtype))

    def signature(self) -> tuple[Any, ...]:
        """What must be equal for codecs to be stacked."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in self.tensors().items())
        inner = tuple(each.signature() for each in vars(self).values() if isinstance(each, Codec))
        return self.name, tuple(sorted(map(repr, self.parameters().items()))), shapes, inner


def bytes_of(tensor: Tensor) -> Tensor:
    """uint8[nbytes] on the CPU: its elements in order, not copied where they lie so already."""
    whole = tensor.contiguous().cpu()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # of one element any stride counts as contiguous


def stacked(codecs: Sequence[Codec]) -> Codec:
    """Codecs of one signature as one, along a new first dimension of their tensors."""
    together = zip(*(codec.tensors().values() for codec in codecs), strict=True)
    columns = iter([torch.stack(column) for column in together])
    return codecs[0].mapped(lambda _: next(columns))


@dataclass(frozen=True, eq=False)
class Whole(Codec):
    """Tokens as they come; ``channels`` 0: as many as they have."""

    channels: int = 0

    name: ClassVar[str] = "whole"

    @property
    def n(self) -> int:
        return self.channels

    @property
    def width(self) -> int:
        return self.channels

    @property
    def residual_width(self) -> int:
        return 0

    @classmethod
    def fit(cls, seen: Observed, kind: Kind, widths: Sequence[int], **options: Any) -> list[Self]:
        """One for each head, whatever the width."""
        return [cls((seen.keys if kind == "key" else seen.values).shape[-1]) for _ in widths]

    def sized(self, n: int) -> Self:
        return replace(self, channels=n)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def residual(self, x: Tensor, z: Tensor) -> Tensor:
        return x[..., :0]

    def asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return query, query[..., :0]

    def read(self, total: Tensor, residual: Tensor | None) -> Tensor:
        return total
