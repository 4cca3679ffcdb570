"""Methods: named policies that turn what a layer's attention saw into a compressed cache layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from grace_opt.compression.budget import Budget, Sharing, allot, bytes_per_channel
from grace_opt.compression.headmaps import AXES, KINDS, Compression, HeadMap, LayerMaps, channel_map, subspace_map
from grace_opt.compression.integers import Bits
from grace_opt.compression.mask import KVMask
from grace_opt.compression.readout import MIXING, ReadoutKind, fit, moments
from grace_opt.errors import InputError
from grace_opt.graphs.bundle import Kind
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES
from grace_opt.graphs.observed import Observed
from grace_opt.graphs.protection import Protection, salient_channels
from grace_opt.problem import FloatArray, IntArray, SubsetProblem
from grace_opt.registry import nearest
from grace_opt.solution import Solution
from grace_opt.solve import solve_many


@dataclass(frozen=True)
class Method(Sharing):
    """A policy; `METHODS` has the named ones, and every field, those of `Sharing` too, can be overridden by its name.

    Attributes:
        structure: ``channels`` are selected; ``svd`` and ``kq-svd`` store projections of the same width instead (a
            floor for what a given width can do: no runtime reads them); ``tokens`` drops old tokens whole.
        objective, value_objective: what a graph measures (`grace_opt.graphs.objectives`).
        aligned: graphs count the tokens that will be pruned; if not, all of the prompt's, as ThinK's code does.
        solver: chooses the channels of each head.
        protection: GRACE's salient key channels, or None.
        readout: how dropped channels are estimated (`compression.readout`), with its ``mixing`` and ``ridge``.
        key_bits, value_bits: integers of 2, 3, 4 or 8 bits for the kept channels of old tokens, or None.
        observation_window: queries whose logits or attention count, the last of the prompt.
        spans: of those queries, in the `attention` objective (`Observed`).
        recent_window, sinks: tokens that stay whole.
    """

    structure: Literal["channels", "svd", "kq-svd", "tokens"] = "channels"
    objective: Literal["logit", "centered", "attention"] = "attention"
    value_objective: Literal["norm", "read", "output"] = "output"
    aligned: bool = True
    solver: str = "greedy"
    protection: Protection | None = None
    readout: ReadoutKind = "attention"
    mixing: float = MIXING["key"]
    value_mixing: float = MIXING["value"]
    ridge: float = 1e-3
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    observation_window: int = 32
    spans: int | None = 2
    recent_window: int = 32
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observation_window < 1:
            raise InputError(f"observation_window must be at least 1, got {self.observation_window}")
        for name in ("recent_window", "sinks", "ridge"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must not be negative, and finite; got {getattr(self, name)}")
        if self.spans is not None and self.spans < 1:
            raise InputError(f"spans must be at least 1, or none for a span a query; got {self.spans}")
        if self.structure != "channels" and (self.key_bits or self.value_bits):
            raise InputError(f"bits are for kept channels, and the structure is {self.structure!r}; leave them out")
        for name in ("mixing", "value_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


_PLAIN: dict[str, Any] = {"objective": "logit", "aligned": False, "budget": "uniform", "readout": "none"}
METHODS: dict[str, Method] = {
    # ThinK (arXiv 2407.21018; its values: appendix D), with sinks, so that all methods keep the same tokens whole.
    "think": Method(value_objective="read", solver="independent", **_PLAIN),
    # GRACE (arXiv 2604.16983): MIES after the salient channels are protected, ceil(ratio n) pruned.
    "grace": Method(value_objective="read", protection=Protection(), rounding="ceil", **_PLAIN),
    "grace-opt": Method(),
    "streaming": Method(structure="tokens", readout="none"),
    "svd": Method(structure="svd", budget="uniform", readout="none"),
    "kq-svd": Method(structure="kq-svd", budget="uniform", readout="none"),
}


def method(name: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The named method with some fields set. Raises InputError for an unknown name or field, or a wrong value."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}{nearest(name, METHODS)}")
    from pydantic import TypeAdapter, ValidationError

    fields = set(Method.__dataclass_fields__)
    for key in overrides or {}:
        if key not in fields:
            raise InputError(f"method {name!r} has no option {key!r}{nearest(key, fields)}")
    given = {key: _parsed(key, value) for key, value in (overrides or {}).items()}
    try:
        return TypeAdapter(Method).validate_python({**vars(METHODS[name]), **given})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a check of the whole
            raise InputError(f"method {name!r}: {first['ctx']['error']}") from None
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"method {name!r}, option {where!r}: {first['msg']}, got {first['input']!r}") from None


def _parsed(key: str, value: Any) -> Any:
    """An option of the command line: numbers that must be one of a few, and None, are not parsed by pydantic."""
    if key in ("key_bits", "value_bits", "protection", "spans") and isinstance(value, str):
        return None if value == "none" else int(value) if value.isdecimal() else value
    return value


def compress(policy: Method, layers: Mapping[int, Observed], budget: Budget) -> Compression:
    """Apply a method to a prompt: graphs, budgets, selection and read-outs of all layers.

    Raises InputError for a budget that the floors, or the protected channels, do not allow.
    """
    if policy.structure == "tokens":
        return _streaming(policy, layers, budget)
    kept = _kept_channels(policy, layers, budget)
    maps = {
        i: LayerMaps({kind: read_out(policy, seen, kind, keeps[i]) for kind, keeps in kept.items()})
        for i, seen in layers.items()
    }
    return Compression(maps, policy.recent_window, policy.sinks)


def compress_by_mask(policy: Method, layers: Mapping[int, Observed], mask: KVMask) -> Compression:
    """Apply a mask's channels to a prompt, with its static read-out or the policy's fitted to it. Raises InputError."""
    maps: dict[int, LayerMaps] = {}
    for i in sorted({*mask.key_keep, *mask.value_keep}):
        if i not in layers:
            raise InputError(f"the mask prunes layer {i}, whose cache this model keeps in a way that cannot be pruned")
        heads_here, _, dim = layers[i].keys.shape
        if (heads_here, dim) != (mask.num_key_value_heads, mask.head_dim):
            raise InputError(
                f"the mask has {mask.num_key_value_heads} KV heads of {mask.head_dim} channels, the model has "
                f"{heads_here} of {dim}; use a mask made for this model"
            )
        heads: dict[Kind, list[HeadMap]] = {}
        for kind, keeps in zip(KINDS, (mask.key_keep, mask.value_keep), strict=True):
            kept = [each.astype(np.int64) for each in keeps.get(i, ())]
            if kept and mask.readout_scope == "static":
                x = layers[i].keys if kind == "key" else layers[i].values
                readouts = [mask.static_readout(kind, i, head) for head in range(len(kept))]
                heads[kind] = [
                    channel_map(keep, x.shape[-1], each, x.device) for keep, each in zip(kept, readouts, strict=True)
                ]
            elif kept:
                heads[kind] = read_out(policy, layers[i], kind, kept)
        maps[i] = LayerMaps(heads)
    return Compression(maps, mask.recent_window, mask.sinks)


def _kept_channels(
    policy: Method, layers: Mapping[int, Observed], budget: Budget
) -> dict[Kind, dict[int, list[IntArray]]]:
    """Kind -> layer -> kept channels int64[d] of each KV head."""
    problems: dict[Kind, list[SubsetProblem]] = {}
    seen = next(iter(layers.values()))
    for kind in KINDS:
        if budget.bytes_per_token is not None or budget.of(kind) > 0 or _bits(policy, kind):
            problems[kind] = [problem for i, each in layers.items() for problem in _problems(policy, i, each, kind)]
    costs = {kind: bytes_per_channel(_bits(policy, kind), seen.keys.element_size()) for kind in KINDS}
    heads_of = {"key": seen.keys, "value": seen.values}
    whole = sum(len(each.keys) * costs[kind] * heads_of[kind].shape[-1] for kind in KINDS for each in layers.values())
    prunes = allot(problems, budget, policy, queries=seen.grouped.shape[1], costs=costs, whole=whole)
    kept: dict[Kind, dict[int, list[IntArray]]] = {}
    for kind, heads in problems.items():
        ready = [replace(problem, prune=m) for problem, m in zip(heads, prunes[kind], strict=True)]
        if policy.structure != "channels":
            solved = [np.arange(m, problem.n) for problem, m in zip(heads, prunes[kind], strict=True)]
        else:
            solved = [_kept(solution) for solution in solve_many(ready, policy.solver)]
        each = len(heads) // len(layers)
        kept[kind] = {i: solved[at * each : (at + 1) * each] for at, i in enumerate(layers)}
    return kept


def _problems(policy: Method, layer: int, seen: Observed, kind: Kind) -> list[SubsetProblem]:
    """The graphs of one layer's KV heads, with nothing to prune yet."""
    protected: list[Any] = [None] * len(seen.keys)
    counted = seen if policy.aligned else seen.unaligned
    if policy.protection is not None and kind == "key":
        norms = counted.keys[:, counted.prunable].double().square().sum(1).sqrt().cpu().numpy()
        protected = [salient_channels(head, policy.protection) for head in norms]
    weights = _weights(policy, counted, kind)
    return [
        SubsetProblem(w, 0, p, name=f"layers.{layer}.kv_heads.{h}.{kind}")
        for h, (w, p) in enumerate(zip(weights, protected, strict=True))
    ]


def _weights(policy: Method, seen: Observed, kind: Kind) -> FloatArray:
    """W of each KV head, float64[H, n, n]."""
    name = policy.objective if kind == "key" else policy.value_objective
    if name not in seen.graphs:
        objective = KEY_OBJECTIVES[name] if kind == "key" else VALUE_OBJECTIVES[name]
        seen.graphs[name] = objective(seen).cpu().numpy()
    return seen.graphs[name]


def _bits(policy: Method, kind: Kind) -> Bits | None:
    return policy.key_bits if kind == "key" else policy.value_bits


def _kept(solution: Solution) -> IntArray:
    if solution.pruned is None:
        raise InputError(f"{solution.problem} has no solution ({solution.status}: {'; '.join(solution.warnings)})")
    return np.setdiff1d(np.arange(solution.n), solution.pruned)


def read_out(policy: Method, seen: Observed, kind: Kind, keeps: Sequence[IntArray]) -> list[HeadMap]:
    """The maps of one layer's heads for given kept channels, fitted to its prunable tokens as they will be stored."""
    tokens = (seen.keys if kind == "key" else seen.values)[:, seen.prunable]
    n, bits, axis = tokens.shape[-1], _bits(policy, kind), AXES[kind]
    if policy.structure != "channels":
        about = moments(tokens, None, 0.0)
        metrics = [_metric(seen, kind, h) if policy.structure == "kq-svd" else None for h in range(len(tokens))]
        return [subspace_map(a, len(k), m, tokens.device) for a, k, m in zip(about, keeps, metrics, strict=True)]
    plain = [channel_map(keep, n, None, tokens.device, bits, axis) for keep in keeps]
    if policy.readout == "none":
        return plain
    if bits is not None:  # the read-out is fitted on what is stored: kept channels as they come back
        tokens = tokens.clone()
        for head, each in zip(tokens, plain, strict=True):
            head[:, each.encode] = each.read(each.store(head))[:, each.encode]
    weights = seen.token_weights if policy.readout == "attention" else None
    about = moments(tokens, weights, policy.mixing if kind == "key" else policy.value_mixing)
    linear = policy.readout != "mean"
    return [
        channel_map(keep, n, fit(a, keep, linear=linear, ridge=policy.ridge), tokens.device, bits, axis)
        for a, keep in zip(about, keeps, strict=True)
    ]


def _metric(seen: Observed, kind: Kind, head: int) -> FloatArray:
    """What is seen of an error in a token: by the observed queries, or through the output projection."""
    if kind == "key":
        rows = seen.grouped[head].double().cpu().numpy()
    elif seen.output is None:
        raise InputError("the output projection of this model's attention was not found; use svd for values")
    else:
        heads, n = seen.values.shape[0], seen.values.shape[-1]
        rows = seen.output.double().cpu().numpy().reshape(-1, heads, seen.queries.shape[0] // heads, n)[:, head]
        rows = rows.reshape(-1, n)
    metric: FloatArray = rows.T @ rows
    return metric


def _streaming(policy: Method, layers: Mapping[int, Observed], budget: Budget) -> Compression:
    """Sinks and as many of the last tokens, whole, as take the bytes that pruning would leave (StreamingLLM)."""
    seen = next(iter(layers.values()))
    n, nv = seen.keys.shape[-1], seen.values.shape[-1]
    old = seen.prunable.stop - seen.prunable.start
    share = ((1 - budget.ratio) * n + (1 - budget.value_ratio) * nv) / (n + nv)
    if budget.bytes_per_token is not None:
        element = seen.keys.element_size()
        share = min(1.0, budget.bytes_per_token / sum(len(each.keys) * element * (n + nv) for each in layers.values()))
    return Compression(
        dict.fromkeys(layers, LayerMaps(hidden=True)), policy.recent_window + round(share * old), policy.sinks
    )
