"""What one layer's attention saw in one window of text: the raw material of graphs and read-outs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.heads import Kind

if TYPE_CHECKING:
    from grace_opt.models.rotary import Turn

T = TypeVar("T")
Index = slice | Tensor  # heads that lie side by side, or int64 of any


class OutputProjection:
    """The projection after an attention module of ``heads`` query heads, for values [.., nv]; asked once, if at all."""

    def __init__(self, attention: Any, heads: int, values: Tensor) -> None:
        self._attention, self._heads, self._like = attention, heads, values.new_empty(0, values.shape[-1])

    def inputs(self, hidden: Tensor) -> InputProjections:
        """The module's projections of what it was given, [T, D]."""
        return InputProjections(self._attention, hidden.float().abs().mean(0))

    @cached_property
    def grams(self) -> Tensor | None:
        """As of `Observed.output_grams`. O(hidden Hq nv^2), and what `output_projection` takes and raises."""
        matrix = output_projection(self._attention, self._heads, self._like)
        return None if matrix is None else _grams(matrix, self._heads)

    def part(self, queries: Index) -> OutputProjection:
        """Of some of the query heads."""
        return _Part(self, queries)


class _Part(OutputProjection):
    def __init__(self, whole: OutputProjection, queries: Index) -> None:
        self._whole, self._queries = whole, queries

    @cached_property
    def grams(self) -> Tensor | None:
        grams = self._whole.grams
        picked = self._queries
        return None if grams is None else grams[picked if isinstance(picked, slice) else picked.to(grams.device)]


@dataclass(frozen=True, eq=False)
class InputProjections:
    """The projections before an attention module, and the mean magnitude [D] of the channels that it was given."""

    attention: Any
    magnitudes: Tensor

    def of(self, kind: Kind) -> tuple[Tensor, Tensor | None]:
        """The weights [H n, D] and the bias [H n] that keys before RoPE, or values, are made by; float64.

        Raises InputError if they are not made so: fused, quantised or adapted projections, and keys that are normalised
        after it.
        """
        layer = getattr(self.attention, f"{kind[0]}_proj", None)
        normed = [name for name, _ in self.attention.named_children() if "norm" in name and not name.startswith("q_")]
        if not isinstance(layer, torch.nn.Module) or not _is_plain(layer) or (kind == "key" and normed):
            raise InputError(
                f"{kind}s of {type(self.attention).__name__} are not a plain linear layer of its input, which ASVD "
                "splits; use cskv, which looks at the keys themselves"
            )
        bias = None if layer.bias is None else double(layer.bias.detach())
        return double(layer.weight.detach()), bias


@dataclass(frozen=True, eq=False)
class Observed:
    """The last queries and all keys and values of one row, post-RoPE, and which tokens a mask would prune.

    queries [Hq, w, n] are those of the last w tokens; keys [H, T, n]; values [H, T, nv]; H divides Hq, and query head g
    belongs to KV head g // (Hq / H). ``output``: the output projection, as its matrix [hidden, Hq nv] or
    as the layer that is one. The first ``sinks`` tokens are whole for every query, and the others while they are fewer
    than ``recent_window`` tokens back.
    ``inputs``: what the keys and values were made of, if that was looked at.
    ``turn``: how RoPE turned the keys, the first of which is at position 0; None if nobody asks.
    ``spans``: how many spans the queries are cut into by the `attention` objective; None: a query is a span.
    ``stored``: int64, the prunable tokens that a token policy leaves to be compressed; None: all.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    sinks: int
    recent_window: int
    output: Tensor | OutputProjection | None = None
    spans: int | None = None
    turn: Turn | None = None
    inputs: InputProjections | None = None
    stored: Tensor | None = None
    made: dict[Hashable, Any] = field(default_factory=dict)  #: by `once`

    def __post_init__(self) -> None:
        if self.queries.shape[0] % self.keys.shape[0] or self.queries.shape[-1] != self.keys.shape[-1]:
            raise InputError(
                f"queries of shape {tuple(self.queries.shape)} cannot attend to keys of shape "
                f"{tuple(self.keys.shape)}; only multi-head, grouped-query and multi-query attention are supported"
            )
        if self.keys.shape[1] <= self.sinks + self.recent_window:
            raise InputError(
                f"{self.keys.shape[1]} tokens have no prunable key between {self.sinks} sinks and a recent window of "
                f"{self.recent_window}; give more tokens or make those shorter"
            )

    @property
    def prunable(self) -> slice:
        """The tokens of which the cache keeps some channels only, once the window has been read."""
        return slice(self.sinks, self.keys.shape[1] - self.recent_window)

    @property
    def counted(self) -> slice | Tensor:
        """Those of them that graphs, bases and read-outs count."""
        return self.prunable if self.stored is None else self.stored

    def part(self, heads: Tensor) -> Observed:
        """What some of the KV heads saw."""
        queries = queries_of(heads, len(self.queries) // len(self.keys))
        output = self.output
        if isinstance(output, Tensor):
            output = output.view(len(output), len(self.queries), -1)[:, queries].flatten(1)
        elif output is not None:
            output = output.part(queries)
        keys, values = self.keys[heads], self.values[heads]
        return replace(self, queries=self.queries[queries], keys=keys, values=values, output=output, made={})

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """What is made of it, such as a graph, made at the first call."""
        if what not in self.made:
            self.made[what] = make()
        made: T = self.made[what]
        return made

    @cached_property
    def output_grams(self) -> Tensor | None:
        """float64[Hq, nv, nv]: W'W of each query head's part W of the output projection; None if it is not known."""
        if isinstance(self.output, OutputProjection):
            return self.output.grams
        return None if self.output is None else _grams(self.output, len(self.queries))

    @cached_property
    def all_tokens(self) -> Observed:
        """The same, as if no token stayed whole."""
        return replace(self, sinks=0, recent_window=0, stored=None, made={})

    @cached_property
    def grouped(self) -> Tensor:
        """The queries by KV head, [H, G w, n]."""
        return self.queries.reshape(self.keys.shape[0], -1, self.keys.shape[-1])

    @cached_property
    def attention(self) -> Tensor:
        """Softmax weights [H, G w, counted] of the pairs that meet pruned: 0 where the token is whole for the query.

        Float32. They are those of the whole attention: the rows sum to less than 1, by what whole tokens receive.
        """
        tokens, width = self.keys.shape[1], self.queries.shape[1]
        at = torch.arange(tokens - width, tokens, device=self.keys.device)
        # No query sees what came after it, and only the last queries have whole tokens that are prunable: all of these
        # are among the last columns.
        last = slice(max(0, tokens - width - self.recent_window), tokens)
        age = at[:, None] - torch.arange(last.start, tokens, device=self.keys.device)
        with torch.no_grad():
            weights = torch.matmul(self.grouped.float() * self.scaling, self.keys.float().mT)
            by_query = weights.view(len(weights), -1, width, tokens)[..., last]
            by_query.masked_fill_(age < 0, -torch.inf)
            torch.softmax(weights, -1, out=weights)
            by_query.masked_fill_(age < self.recent_window, 0)
        return weights[..., self.counted]

    @cached_property
    def token_weights(self) -> Tensor:
        """Attention that each counted token receives, [H, counted], summing to 1; equal where none receives any."""
        received = self.attention.sum(1)
        total = received.sum(-1, keepdim=True)
        return torch.where(total > 0, received / total, torch.full_like(received, 1 / received.shape[-1]))


def index_of(heads: Tensor) -> Index:
    """What picks these heads: a slice where it can, which copies nothing."""
    first, last = int(heads[0]), int(heads[-1])
    return slice(first, last + 1) if heads.tolist() == list(range(first, last + 1)) else heads


def queries_of(heads: Index, group: int) -> Index:
    """The query heads of some KV heads."""
    if isinstance(heads, slice):
        return slice(heads.start * group, heads.stop * group)
    return (heads[:, None] * group + torch.arange(group, device=heads.device)).flatten()


def double(tensor: Tensor) -> Tensor:
    """In float64, on its own device where that has float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def output_projection(attention: Any, heads: int, values: Tensor) -> Tensor | None:
    """The matrix [hidden, heads * nv] of the projection after an attention module; None if it has no known name.

    The weight of a plain `torch.nn.Linear`. Any other layer is run on unit vectors of the dtype and on the device of
    ``values`` [.., nv], as its parameters say nothing of adapters, scales of quantised weights, or where an offloaded
    weight is: O(hidden (heads nv)^2). Raises InputError if that layer is not linear (but for a constant) within a
    tenth, as far as quantised activations are.
    """
    for name in ("o_proj", "out_proj", "dense", "wo", "c_proj"):
        layer = getattr(attention, name, None)
        if isinstance(layer, torch.nn.Module):
            return layer.weight.detach() if _is_plain(layer) else _matrix(layer, heads * values.shape[-1], values)
    return None


def _is_plain(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a layer multiplies by its weight and does nothing else: no subclass, of the weight neither (quantised
    ones are), no hook, no forward of its own."""
    if type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter or layer.weight.is_meta:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _matrix(layer: torch.nn.Module, width: int, like: Tensor) -> Tensor:
    units = torch.eye(width, dtype=like.dtype, device=like.device)
    probe = torch.linspace(0, 40 * width, width, dtype=torch.float64).sin().to(like)  # no direction of its own
    with torch.no_grad():
        constant = layer(torch.zeros_like(units[None, :1]))[0]
        matrix = (layer(units[None])[0] - constant).mT
        # Each alone, as some quantise by the largest entry of all rows.
        for factor in (1, -4):
            found = double(layer(factor * probe[None, None])[0] - constant)
            expected = factor * double(probe[None]) @ double(matrix).mT
            if not bool((found - expected).norm() <= 0.1 * expected.norm()):
                raise InputError(
                    f"the output projection of this model's attention ({type(layer).__name__}) is not linear, so what "
                    "its values become is no quadratic; use the norm objective, and call model.eval() if it is training"
                )
    weight: Tensor = matrix.detach()
    return weight


def _grams(matrix: Tensor, heads: int) -> Tensor:
    parts = matrix.float().view(len(matrix), heads, -1).movedim(1, 0)
    return double(parts.mT @ parts)
