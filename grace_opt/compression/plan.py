"""CachePlan: what becomes of every token in a model's cache. Runtime, evaluation, masks and exports read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from grace_opt.compression.budget import Budget
from grace_opt.compression.method import Method, Windows
from grace_opt.compression.readout import ReadoutRecipe
from grace_opt.compression.tokens.base import TokenRule
from grace_opt.errors import InputError
from grace_opt.heads import KINDS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.compression.codec import Codec


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What the cache of one layer holds of each token.

    Attributes:
        index: of the layer.
        codecs: kind -> one for each KV head, or one for all. A kind that is left out is held as it comes.
        windows: sinks, recent window, and what becomes of generated tokens.
        readout: fit read-outs of this recipe to each prompt, for codecs that have dropped channels and no read-out of
            their own; None: read them as their codecs say.
        queries: how many of a prompt's last queries read-outs, token policies and choices are fitted to.
        spans: of these queries, in the `attention` objective.
        tokens: which old tokens stay; None: all.
        choice: in place of ``codecs``: the method and budget that choose them from each prompt, layer by layer.
    """

    index: int
    codecs: Mapping[Kind, Sequence[Codec]] = field(default_factory=dict)
    windows: Windows = field(default_factory=Windows)
    readout: ReadoutRecipe | None = None
    queries: int = 32
    spans: int | None = 2
    tokens: TokenRule | None = None
    choice: Choice | None = None

    @property
    def heads(self) -> int | None:
        """KV heads, where the codecs say."""
        return next((sum(codec.heads for codec in each) for each in self.codecs.values()), None)

    @property
    def joint(self) -> bool:
        """Whether rows are of all KV heads, of keys or of values."""
        return any(codec.heads > 1 for each in self.codecs.values() for codec in each)

    @property
    def watches(self) -> bool:
        """Whether it needs what a prompt's attention saw."""
        return self.readout is not None or self.tokens is not None or self.choice is not None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that are not held as they come."""
        if self.choice is None:
            return tuple(kind for kind in KINDS if kind in self.codecs)
        return tuple(kind for kind in KINDS if self.choice.compresses(kind))

    def part(self, heads: Sequence[int]) -> LayerPlan:
        """The plan of some of the heads."""
        # One codec alone is of any number of heads: integers of whole tokens.
        codecs = {kind: [each[head if len(each) > 1 else 0] for head in heads] for kind, each in self.codecs.items()}
        return replace(self, codecs=codecs)

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raise InputError if the codecs do not fit a layer's keys and values [B, H, n, D]."""
        for kind, states in zip(KINDS, (keys, values), strict=True):
            codecs = self.codecs.get(kind, ())
            sizes = {codec.n for codec in codecs} - {0}
            heads = sum(codec.heads for codec in codecs)
            if sizes and (heads != states.shape[1] or sizes != {states.shape[3]}):
                size = " or ".join(map(str, sorted(sizes)))
                raise InputError(
                    f"the mask has {heads} KV heads of {size} {kind} channels in layer {self.index}, the model "
                    f"has {states.shape[1]} of {states.shape[3]}; use a mask made for this model"
                )


@dataclass(frozen=True)
class Choice:
    """A method at a budget, to be applied to each prompt in each layer by itself."""

    method: Method
    budget: Budget

    def __post_init__(self) -> None:
        self.budget.require_no_share("a layer's choice")
        if self.budget.bytes_per_token is not None:
            raise InputError(
                "a budget in bytes is shared over all layers, and a layer that chooses from each prompt cannot wait "
                "for the others; give ratios, or make a mask with grace-opt solve"
            )

    def compresses(self, kind: Kind) -> bool:
        """Whether keys (or values) are not held as they come."""
        return self.method.bits(kind) is not None or (self.method.codec != "whole" and self.budget.of(kind) > 0)


@dataclass(frozen=True, eq=False)
class CachePlan:
    """A plan for each layer that is compressed; the others stay whole."""

    layers: Mapping[int, LayerPlan]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers.values())

    def widths(self, kind: Kind) -> dict[int, list[int]]:
        """Layer -> numbers stored for a token by each KV head, of the layers whose keys (or values) are compressed."""
        return {
            i: [codec.width for codec in each.codecs[kind]] for i, each in self.layers.items() if kind in each.codecs
        }

    def changed(
        self,
        *,
        generated: Literal["keep", "prune"] | None = None,
        recent_window: int | None = None,
        sinks: int | None = None,
        bits: Mapping[Kind, int] | None = None,
    ) -> CachePlan:
        """The plan with some of its parts overridden: ``bits`` holds the rows of a kind as integers (0: as they are).

        Raises InputError for a number that is out of range.
        """
        given = {"generated": generated, "recent_window": recent_window, "sinks": sinks}
        overrides = {name: value for name, value in given.items() if value is not None}
        return CachePlan({i: _changed(layer, overrides, bits or {}) for i, layer in self.layers.items()})


def _changed(layer: LayerPlan, windows: Mapping[str, Any], bits: Mapping[Kind, int]) -> LayerPlan:
    changed = replace(layer, windows=replace(layer.windows, **windows))
    if not bits:
        return changed
    if layer.choice is not None:
        return replace(changed, choice=replace(layer.choice, method=layer.choice.method.with_bits(bits)))
    from grace_opt.compression.codec import Whole
    from grace_opt.compression.integers import as_integers

    codecs = dict(layer.codecs)
    for kind, each in bits.items():
        whole = [Whole()] * (layer.heads or 1)  # whole tokens of any number of heads are stored alike
        codecs[kind] = [as_integers(codec, each, kind) for codec in codecs.get(kind) or whole]
    return replace(changed, codecs=codecs)
