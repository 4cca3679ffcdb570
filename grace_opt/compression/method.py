"""Methods: named policies, composed of parts, that say how a cache is to be compressed. `apply` carries them out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

from grace_opt.compression.budget import Budget, Sharing, bytes_per_channel
from grace_opt.compression.pays import row_unit
from grace_opt.compression.plugins import CODECS, POLICIES
from grace_opt.compression.readout import ReadoutRecipe
from grace_opt.errors import InputError, did_you_mean
from grace_opt.graphs.protection import Protection
from grace_opt.heads import KINDS, Kind

BITS = (2, 3, 4, 8)
CROP = 32  # tokens that can be taken back, at most


@dataclass(frozen=True)
class Windows:
    """Which tokens stay whole, and what becomes of those that are generated.

    Attributes:
        sinks: the first tokens of a row.
        recent_window: the last ones.
        generated: ``keep``: the prompt's last ``recent_window`` tokens and all that come after the prompt stay whole,
            as in ThinK and GRACE; ``prune``: the window moves on, and what leaves it is compressed too.
    """

    sinks: int = 4
    recent_window: int = 32
    generated: Literal["keep", "prune"] = "prune"

    def __post_init__(self) -> None:
        for name in ("sinks", "recent_window"):
            if not 0 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} must be from 0 to {2**31 - 1}, got {getattr(self, name)}")
        if self.generated not in ("keep", "prune"):
            raise InputError(f"generated must be keep or prune, got {self.generated!r}")

    @property
    def spare(self) -> int:
        """How many tokens behind the recent window hold what makes them whole, so that as many can be taken back."""
        return min(self.recent_window, CROP)


@dataclass(frozen=True)
class Selection:
    """How channels are chosen.

    Attributes:
        objective, value_objective: what a graph measures (`grace_opt.graphs.objectives`).
        prunable_only: graphs count the tokens that will be pruned; if not, all of the prompt's, as ThinK's code does.
        solver: chooses the channels of each head, from each prompt.
        offline_solver: does it for masks, where its time matters less.
        protection: GRACE's salient key channels, or None.
        observation_window: queries whose logits or attention count, the last of the prompt.
        spans: of those queries, in the `attention` objective (`Observed`).
    """

    objective: Literal["logit", "centered", "attention"] = "attention"
    value_objective: Literal["norm", "read", "output"] = "output"
    prunable_only: bool = True
    solver: str = "greedy"
    offline_solver: str = "auto"
    protection: Protection | None = None
    observation_window: int = 32
    spans: int | None = 2

    def __post_init__(self) -> None:
        if self.observation_window < 1:
            raise InputError(f"observation_window must be at least 1, got {self.observation_window}")
        if self.spans is not None and self.spans < 1:
            raise InputError(f"spans must be at least 1, or none for a span a query; got {self.spans}")


@dataclass(frozen=True)
class Method:
    """A policy; `METHODS` has the named ones, and every field of it or of its parts can be overridden by its name.

    Attributes:
        codec: how old tokens are stored (`grace_opt.compression.codec.CODECS`), with its own ``codec_options``.
        tokens: the token policy (`grace_opt.compression.tokens`), with ``token_options``; None: all tokens stay.
        token_share: of the old tokens, how many may stay; None: as many as the budget leaves bytes for, and with a
            codec a share of the bytes is split between tokens and channels (`grace_opt.compression.split`).
        key_bits, value_bits: integers of 2, 3, 4 or 8 bits for the rows of old tokens, or None.
        selection: how channels are chosen, where the codec keeps channels.
        sharing: how the budget is shared over heads.
        readout: how dropped channels are estimated.
        windows: which tokens stay whole.
    """

    codec: str = "channels"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    tokens: str | None = None
    token_options: Mapping[str, Any] = field(default_factory=dict)
    token_share: float | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    selection: Selection = field(default_factory=Selection)
    sharing: Sharing = field(default_factory=Sharing)
    readout: ReadoutRecipe = field(default_factory=ReadoutRecipe)
    windows: Windows = field(default_factory=lambda: Windows(generated="keep"))

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in (None, *BITS):
                raise InputError(f"{name} must be 2, 3, 4 or 8, or none; got {getattr(self, name)}")
        for what, table in ((self.codec, CODECS), (self.tokens, POLICIES)):
            if what is not None and what not in table:
                raise InputError(f"unknown {table.what} {what!r}{did_you_mean(what, list(table))}")
        if self.token_share is not None and not 0 <= self.token_share <= 1:
            raise InputError(f"token_share must be from 0 to 1, got {self.token_share}")

    @property
    def splits(self) -> bool:
        """Whether a budget is split between a token policy and a codec."""
        return self.tokens is not None and self.token_share is None and self.codec != "whole"

    def require_split(self, budget: Budget) -> None:
        """Raise InputError if a budget would have to be split and cannot be."""
        if not self.splits:
            return
        between = f"between the token policy {self.tokens!r} and the codec {self.codec!r}"
        if budget.share is None:
            raise InputError(
                f"only a share of the bytes can be split {between}; give --budget-share, or token_share, the share of "
                "old tokens that stay"
            )
        if not CODECS[self.codec].selects or self.selection.objective != "attention":
            raise InputError(
                f"a share is split {between} by the error that each makes, which is known of channels chosen by the "
                "attention objective; give token_share, the share of old tokens that stay"
            )

    def bits(self, kind: Kind) -> int | None:
        """Of the rows of keys or values."""
        return self.key_bits if kind == "key" else self.value_bits

    def channel_bytes(self, itemsize: int) -> dict[Kind, float]:
        """Bytes of one channel of an old token, in a cache of numbers of so many bytes."""
        return {kind: bytes_per_channel(self.bits(kind), itemsize) for kind in KINDS}

    def sharing_of_bytes(self, itemsize: int, sizes: Iterable[int]) -> Sharing:
        """How a share of the bytes is shared over heads of these sizes: in widths whose rows leave no room unused."""
        packed = all(self.bits(kind) for kind in KINDS)
        align = math.lcm(self.sharing.align, 1 if packed else row_unit(itemsize))
        return self.sharing if any(n % align for n in sizes) else replace(self.sharing, align=align)

    def with_bits(self, bits: Mapping[Kind, int]) -> Method:
        """With other bits for some kinds; 0: none."""
        return replace(self, **{f"{kind}_bits": each or None for kind, each in bits.items()})  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Every field and every part's field by its own name, as JSON holds them."""
        flat: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            flat |= asdict(value) if each.name in _PARTS else {each.name: value}
        return flat


_PARTS: dict[str, type] = {"selection": Selection, "sharing": Sharing, "readout": ReadoutRecipe, "windows": Windows}
_HOLDER = {each.name: part for part, of in _PARTS.items() for each in fields(of)}  # option -> the part that has it
_OWN = {each.name for each in fields(Method)} - set(_PARTS)


def _think(**selection: Any) -> dict[str, Any]:
    """What ThinK and GRACE share: graphs of the logits over all prompt tokens, one budget a head, no read-out."""
    chosen = Selection(objective="logit", value_objective="read", prunable_only=False, **selection)
    return {"selection": chosen, "readout": ReadoutRecipe("none")}


def _evicting(tokens: str) -> Method:
    return Method(codec="whole", tokens=tokens, readout=ReadoutRecipe("none"))


_UNIFORM: dict[str, Any] = {"sharing": Sharing("uniform"), "readout": ReadoutRecipe("none")}
_JOINT: dict[str, Any] = {"windows": Windows(generated="prune"), **_UNIFORM}
METHODS: dict[str, Method] = {
    # ThinK (arXiv 2407.21018; its values: appendix D), with sinks, so that all methods keep the same tokens whole.
    "think": Method(sharing=Sharing("uniform"), **_think(solver="independent", offline_solver="independent")),
    # GRACE (arXiv 2604.16983): MIES after the salient channels are protected, ceil(ratio n) pruned.
    "grace": Method(
        sharing=Sharing("uniform", rounding="ceil"), **_think(offline_solver="greedy", protection=Protection())
    ),
    "grace-opt": Method(),
    # Which tokens stay, each with its paper in grace_opt.compression.tokens; all of a token or nothing.
    **{
        name: _evicting(name)
        for name in ("streaming", "snapkv", "pyramidkv", "adakv", "tova", "knorm", "keydiff", "expected-attention")
    },
    # H2O sums attention over all queries of the prompt; of longer ones, here over the last 1024.
    "h2o": replace(_evicting("h2o"), selection=Selection(observation_window=1024)),
    "svd": Method(codec="lowrank", codec_options={"basis": "svd"}, **_UNIFORM),
    "kq-svd": Method(codec="lowrank", codec_options={"basis": "kq-svd"}, **_UNIFORM),
    # CSKV (arXiv 2409.10593), its ranks fitted to each prompt in closed form, its window sliding.
    "cskv": Method(codec="cskv", codec_options={"basis": "cskv"}, **_JOINT),
    "cskv-attention": Method(codec="cskv", codec_options={"basis": "attention"}, **_JOINT),
    # ASVD (arXiv 2312.05821), as CSKV initialises from it.
    "asvd": Method(codec="cskv", codec_options={"basis": "asvd"}, **_JOINT),
}

_KINDS = ("tokens", "codec", "integers")  # of the parts of a composed name, in order
_INTEGERS = {f"int{bits}": bits for bits in BITS}  # the end of a composed name -> bits of keys and values
_ALL_CHANNELS = Method(codec="whole", readout=ReadoutRecipe("none"))


def method(name: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The named method with some fields, of it or of its parts, set; strings are parsed as the command line's.

    A name may be composed, in this order, of one that chooses tokens, one that chooses channels or a basis, and
    integers: ``snapkv+grace-opt+int4`` keeps SnapKV's tokens as grace-opt's channels, of 4 bits each. Raises InputError
    for an unknown name or field (with the nearest), parts in another order, or a wrong value.
    """
    kinds = [_kind_of(part) for part in name.split("+")]
    if kinds != [kind for kind in _KINDS if kind in kinds]:
        raise InputError(
            f"method {name!r} is not composed in order; name at most one that chooses tokens, then one that chooses "
            "channels or a basis, then integers, as in snapkv+grace-opt+int4"
        )
    parts = dict(zip(kinds, name.split("+"), strict=True))
    base = parts.get("codec", parts.get("tokens"))
    options = (_ALL_CHANNELS if base is None else METHODS[base]).options()
    if "tokens" in parts:
        chosen = METHODS[parts["tokens"]]
        options |= {"tokens": chosen.tokens, "token_options": chosen.token_options}
    if "integers" in parts:
        bits = _INTEGERS[parts["integers"]]
        options |= {"key_bits": bits, "value_bits": bits}
    return from_options({**options, **(overrides or {})}, name)


def _kind_of(name: str) -> str:
    if name in _INTEGERS:
        return "integers"
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}{did_you_mean(name, [*METHODS, *_INTEGERS])}")
    return "codec" if METHODS[name].tokens is None else "tokens"


def require_effect(method: Method, given: Collection[str], budgets: Sequence[Budget]) -> None:
    """Raise InputError for an option, of those ``given``, that has no effect with what else the method is."""
    kind, fitted = method.sharing.budget, method.readout.readout_fit
    selects = method.codec == "channels" or CODECS[method.codec].selects  # the table loads torch
    # Graphs say what is kept, or how much of each.
    measured = selects or (kind == "shared" and method.codec != "whole" and not CODECS[method.codec].spectral)
    other_budget = f"in a {kind} budget; leave it out, or give budget="
    no_readout = f"with readout_fit={fitted}; leave it out, or give readout_fit=attention"
    no_tokens = "without a token policy; leave it out, or give tokens=NAME"
    not_measured = f"with codec={method.codec}, which is not fitted by graphs; leave it out"
    reads_attention = fitted == "attention" or (measured and method.selection.objective == "attention")
    effects: dict[str, tuple[bool, str]] = {
        "floor": (kind == "shared", other_budget + "shared"),
        "value_weight": (kind == "shared", other_budget + "shared"),
        "token_weight": (method.splits, "unless a share is split between a token policy and a codec; leave it out"),
        "rounding": (kind == "uniform", other_budget + "uniform"),
        "objective": (measured, not_measured),
        "value_objective": (measured, not_measured),
        "prunable_only": (measured, not_measured),
        "solver": (selects, not_measured),
        "protection": (measured, not_measured),
        "spans": (reads_attention, "unless the objective or the read-out is attention; leave it out"),
        "ridge": (fitted not in ("none", "mean"), no_readout),
        "mixing": (fitted != "none", no_readout),
        "value_mixing": (fitted != "none", no_readout),
        "token_options": (method.tokens is not None, no_tokens),
        "token_share": (method.tokens is not None, no_tokens),
    }
    for name, (effective, otherwise) in effects.items():
        if name in given and not effective:
            raise InputError(f"{name} has no effect {otherwise}")
    for budget in budgets:
        method.require_split(budget)
        if method.codec == "whole" and method.tokens is None and budget.share is None:
            raise InputError(
                "integers alone prune nothing, so ratios and bytes a token have no effect on them; give a share of the "
                "bytes that they are to stay below (--budget-share)"
            )
    if "value_weight" in given and all(each.bytes_per_token is each.share is None for each in budgets):
        raise InputError("value_weight has no effect on ratios; leave it out, or give --budget-bytes or --budget-share")


def from_options(options: Mapping[str, Any], name: str = "of the file") -> Method:
    """A method from `Method.options`, in JSON's types or the command line's. Raises InputError."""
    from pydantic import ValidationError

    given: dict[str, Any] = {}
    for key, value in options.items():
        if key not in _HOLDER and key not in _OWN:
            raise InputError(f"method {name!r} has no option {key!r}{did_you_mean(key, [*_OWN, *_HOLDER])}")
        parsed = _parsed(key, value)
        if key in _HOLDER:
            given.setdefault(_HOLDER[key], {})[key] = parsed
        else:
            given[key] = parsed
    try:
        made: Method = _validator().validate_python(given)
        return made
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first.get("ctx", {}).get("error", first["msg"]))
        where = next((str(part) for part in reversed(first["loc"]) if part in _HOLDER or part in _OWN), None)
        if where is None:  # a check of the whole, or of a part
            raise InputError(f"method {name!r}: {message}") from None
        raise InputError(f"method {name!r}, option {where!r}: {message}, got {first['input']!r}") from None


@cache
def _validator() -> Any:
    """Made once: a mask may name a method in each of its layers."""
    from pydantic import TypeAdapter

    return TypeAdapter(Method)


def _parsed(key: str, value: Any) -> Any:
    """An option of the command line: numbers that must be one of a few, and None, are not parsed by pydantic."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if key in ("codec_options", "token_options") and isinstance(value, str):
        pairs = (pair.partition(":") for pair in value.split(",") if pair)
        return {option: text for option, _, text in pairs}
    if key in ("key_bits", "value_bits", "protection", "spans", "tokens", "token_share") and isinstance(value, str):
        if value == "none":
            return None
        if key == "protection" and value == "default":
            return asdict(Protection())
        return int(value) if value.isdecimal() else value
    return value
