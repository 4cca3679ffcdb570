"""A method applied: to what a prompt's attention saw, or to one layer of a prompt. (`from_bundle` is for bundles.)

The only place where something is chosen: channels, widths, bases, read-outs, tokens. Everything else reads the plan.
Over 400 lines: what is chosen for all layers together, and layer by layer, is chosen by the same parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.budget import Allotment, Budget, ShareError, within_share
from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, stacked
from grace_opt.compression.integers import as_integers
from grace_opt.compression.method import Method
from grace_opt.compression.pays import Shapes, held_bytes
from grace_opt.compression.plan import CachePlan, Choice, LayerPlan
from grace_opt.compression.plugins import CODECS
from grace_opt.compression.readout import ReadoutRecipe, fit_many, weighted_moments
from grace_opt.compression.tokens.base import Tier, TokenRule, compressed, policy_named
from grace_opt.compression.tokens.scores import mass_lost
from grace_opt.errors import InputError
from grace_opt.graphs.objectives import KEY_OBJECTIVES, VALUE_OBJECTIVES
from grace_opt.graphs.observed import Observed, double
from grace_opt.graphs.protection import salient_channels
from grace_opt.greedy import forward
from grace_opt.heads import KINDS, HeadName, Kind
from grace_opt.problem import FloatArray, IntArray, SubsetProblem, prune_count
from grace_opt.solution import Solution, Status
from grace_opt.solve import solve_many

_STEPS = 12  # token shares that are tried, down to 0.022
Layers = Mapping[int, Observed]
Parts = Mapping[int, Sequence[Observed]]  # of each layer, what its heads saw: of all in one, or of each


def apply(method: Method, layers: Layers, budget: Budget) -> CachePlan:
    """The plan for one prompt's cache: graphs, budgets, selection and projections of all layers together.

    ``layers``: what each layer saw, with the method's windows. Read-outs and token policies are
    left to the cache, which fits them to the tokens that it stores. Raises InputError for a budget that the floors, or
    the protected channels, do not allow.
    """
    method.require_split(budget)
    if method.splits:
        method = split(method, layers, budget)
    parts = _stored(method, layers)
    allotment = _allotment(method, layers, parts, budget)
    if budget.share is not None:
        budget = _within(method, layers, parts, budget, allotment)
    return _applied(method, layers, parts, budget, allotment, method.selection.solver)


def split(method: Method, layers: Layers, budget: Budget) -> Method:
    """The method with the token share at which a share of the bytes is split between tokens and channels.

    Shares are tried from 1 down, each 2^-1/2 of the one before, while the estimated error falls: what dropped channels
    cost (`Allotment.error`), and ``token_weight`` times the attention on dropped tokens. Raises ShareError if
    no token share holds so little. O(shares tried) times a plan without its solver.
    """
    best: tuple[float, Method] | None = None
    for step in range(_STEPS):
        tried = replace(method, token_share=2 ** (-step / 2))
        try:
            error = _error(tried, layers, budget)
        except ShareError:
            if best is None and step == _STEPS - 1:
                raise
            continue
        if best is not None and error >= best[0]:
            break
        best = error, tried
    assert best is not None
    return best[1]


def _error(method: Method, layers: Layers, budget: Budget) -> float:
    parts = _stored(method, layers)
    allotment = _allotment(method, layers, parts, budget)
    assert allotment is not None
    assert method.token_share is not None
    channels = allotment.error(_within(method, layers, parts, budget, allotment))
    rules = _token_rules(method, list(layers), method.token_share)
    lost = torch.cat([mass_lost(rule, layers[i]) for i, rule in rules.items() if rule is not None])
    return channels + method.sharing.token_weight * float(lost.mean())


def _within(method: Method, layers: Layers, parts: Parts, budget: Budget, allotment: Allotment | None) -> Budget:
    """In bytes, what a share of them allows."""
    itemsize = next(iter(layers.values())).keys.element_size()
    full = sum(states.nbytes for seen in layers.values() for states in (seen.keys, seen.values))

    def held(tried: Budget) -> float:
        plan = _applied(method, layers, parts, tried, allotment, None)
        total = 0.0
        for each, seen in zip(plan, layers.values(), strict=True):
            kept = None if each.tokens is None else each.tokens.kept(seen)
            total += held_bytes(each, _shapes(seen), seen.keys.shape[1], itemsize, kept)
        return total

    return within_share(budget, held, _whole(method, layers), full)


def _applied(
    method: Method, layers: Layers, parts: Parts, budget: Budget, allotment: Allotment | None, solver: str | None
) -> CachePlan:
    """``solver`` None: any channels, as many as the budget says; the plan says what the cache will hold."""
    rules = _token_rules(method, list(layers), _token_share(method, layers, budget))
    codecs: dict[int, dict[Kind, list[Codec]]] = {i: {} for i in layers}
    for kind, keeps in _kept_channels(method, layers, budget, allotment, solver).items():
        for i, each in parts.items():
            codecs[i][kind] = _codecs(method, each, kind, keeps[i], solver)
    return CachePlan({i: _layer_plan(method, i, codecs[i], rules[i]) for i in layers})


def _stored(method: Method, layers: Layers) -> Parts:
    """What graphs, bases and read-outs are made of: the tokens that a policy leaves to be compressed.

    Of all heads of a layer together, but under a policy ``per_head`` of each.
    """
    if method.codec == "whole" or method.tokens is None or method.token_share is None:
        return {i: [seen] for i, seen in layers.items()}
    parts = {}
    for i, rule in _token_rules(method, list(layers), method.token_share).items():
        assert rule is not None
        seen, tiers = layers[i], rule.policy.tiers(layers[i], rule.share).clone()
        tiers[..., : seen.prunable.start] = tiers[..., seen.prunable.stop :] = Tier.WHOLE
        heads = [seen]
        if rule.policy.per_head:
            heads = [seen.part(torch.tensor([head], device=seen.keys.device)) for head in range(len(seen.keys))]
        rows = tiers.view(len(heads), -1)
        parts[i] = [replace(each, stored=compressed(row), made={}) for each, row in zip(heads, rows, strict=True)]
    return parts


def _shapes(seen: Observed) -> Shapes:
    return {kind: (len(states), states.shape[-1]) for kind, states in zip(KINDS, (seen.keys, seen.values), strict=True)}


def _whole(method: Method, layers: Layers) -> float:
    """Bytes of an old token with nothing pruned, in all layers."""
    costs = method.channel_bytes(next(iter(layers.values())).keys.element_size())
    return sum(costs[kind] * math.prod(shape) for seen in layers.values() for kind, shape in _shapes(seen).items())


def online(method: Method, layers: Sequence[int], budget: Budget) -> CachePlan:
    """The plan of a cache that chooses in each layer by itself, from each prompt, right after its attention.

    Every head prunes the same number of channels, as a layer cannot wait for those behind it; the selection is greedy,
    or independent (ThinK). Raises InputError for other solvers, a budget in bytes, or an unknown codec or policy.
    """
    if CODECS[method.codec].selects and method.selection.solver not in ("greedy", "independent"):
        raise InputError(
            "a cache that chooses its channels from each prompt selects them by the greedy or the independent solver, "
            f"not by {method.selection.solver}; make a mask with grace-opt solve instead"
        )
    method.require_split(budget)
    rules = _token_rules(method, layers, _share(method, budget))
    choice = Choice(method, budget)
    return CachePlan({i: replace(_layer_plan(method, i, {}, rules[i]), choice=choice) for i in layers})


def for_prompt(plan: LayerPlan, rows: Sequence[tuple[Observed, bool]], kind: Kind, states: Tensor) -> Codec:
    """The codec of a layer's keys or values [B, H, T, n] for the prompts of a batch, its tensors [1 or B, H, ..].

    rows: what the attention of each row saw, and whether it has old tokens; a row without any is read as zeros in its
    dropped channels. Needed where the plan leaves something open. Chooses and fits that; the heads' codecs must be of
    one signature.
    """
    n = states.shape[-1]
    if plan.choice is None:
        codec = stacked([each.sized(n) for each in plan.codecs[kind]]).to(states).mapped(lambda tensor: tensor[None])
    else:
        codec = _chosen(plan.choice, rows, kind, n).to(states)
    if plan.readout is not None and plan.readout.readout_fit != "none" and any(old for _, old in rows):
        codec = _with_readout(codec, plan.readout, rows, kind)
    return codec


# ---------------------------------------------------------------- a whole prompt


def _layer_plan(
    method: Method, index: int, codecs: Mapping[Kind, Sequence[Codec]], tokens: TokenRule | None
) -> LayerPlan:
    return LayerPlan(
        index,
        codecs,
        method.windows,
        recipe_of(method),
        method.selection.observation_window,
        method.selection.spans,
        tokens,
    )


def recipe_of(method: Method) -> ReadoutRecipe | None:
    """The read-out that a cache fits to each prompt, if the method has one."""
    return None if method.readout.readout_fit == "none" or not CODECS[method.codec].selects else method.readout


def _token_rules(method: Method, layers: Sequence[int], share: float) -> dict[int, TokenRule | None]:
    """Of each layer, ``share`` of the old tokens on average."""
    if method.tokens is None:
        return dict.fromkeys(layers)
    policy = policy_named(method.tokens, method.token_options)
    shares = policy.layer_shares(share, len(layers))
    return {i: TokenRule(policy, each) for i, each in zip(layers, shares, strict=True)}


def _token_share(method: Method, layers: Layers, budget: Budget) -> float:
    """Of the old tokens; as many as the budget leaves bytes for where the method does not say."""
    if budget.bytes_per_token is None or method.token_share is not None:
        return _share(method, budget)
    return min(1.0, budget.bytes_per_token / _whole(method, layers))


def _share(method: Method, budget: Budget) -> float:
    """Of the old tokens: keys and values of one size are assumed where ratios differ."""
    return method.token_share if method.token_share is not None else 1 - (budget.ratio + budget.value_ratio) / 2


def _allotment(method: Method, layers: Layers, parts: Parts, budget: Budget) -> Allotment | None:
    """Of what the budget prunes; None where nothing is chosen by channels."""
    if method.codec == "whole":
        return None
    codec, shared = CODECS[method.codec], method.sharing.budget == "shared"
    spectral = shared and codec.spectral
    make = _spectra if spectral else _problems if codec.selects or shared else _sizes
    problems: dict[Kind, list[SubsetProblem]] = {
        kind: [problem for i, each in parts.items() for problem in make(method, i, each, kind)]
        for kind in KINDS
        if budget.prunes(kind) or method.bits(kind)
    }
    seen = next(iter(layers.values()))
    itemsize, whole = seen.keys.element_size(), _whole(method, layers)
    sizes = {problem.n for heads in problems.values() for problem in heads}
    sharing = method.sharing if budget.share is None else method.sharing_of_bytes(itemsize, sizes)
    queries = 1 if spectral else seen.grouped.shape[1]
    return Allotment(problems, sharing, queries=queries, costs=method.channel_bytes(itemsize), whole=whole)


def _kept_channels(
    method: Method, layers: Layers, budget: Budget, allotment: Allotment | None, solver: str | None
) -> dict[Kind, dict[int, list[IntArray]]]:
    """Kind -> layer -> kept channels int64[d] of each KV head (for other codecs than channels, d numbers)."""
    if allotment is None:
        return {
            kind: {i: [np.arange(n)] * heads for i, seen in layers.items() for heads, n in [_shapes(seen)[kind]]}
            for kind in KINDS
            if method.bits(kind)
        }
    prunes = allotment.of(budget)
    kept: dict[Kind, dict[int, list[IntArray]]] = {}
    for kind, heads in allotment.problems.items():
        if CODECS[method.codec].selects and solver is not None:
            ready = [replace(problem, prune=m) for problem, m in zip(heads, prunes[kind], strict=True)]
            solved = [kept_of(solution) for solution in solve_many(ready, solver)]
        else:
            solved = [np.arange(m, problem.n) for problem, m in zip(heads, prunes[kind], strict=True)]
        each = len(heads) // len(layers)
        kept[kind] = {i: solved[at * each : (at + 1) * each] for at, i in enumerate(layers)}
    return kept


def kept_of(solution: Solution) -> IntArray:
    """int64[d]: the channels that a selection keeps. Raises InputError if there is none, or none to be trusted."""
    told = math.isfinite(solution.objective) and solution.status in (Status.OPTIMAL, Status.FEASIBLE)
    if solution.pruned is None or not told:
        why = "; ".join([str(solution.status), *solution.warnings])
        raise InputError(f"{solution.problem} has no solution of {solution.solver} that can be used ({why})")
    return np.setdiff1d(np.arange(solution.n), solution.pruned)


def _codecs(
    method: Method, parts: Sequence[Observed], kind: Kind, keeps: Sequence[IntArray], solver: str | None
) -> list[Codec]:
    """The codecs of one layer's heads."""
    n, bits = (parts[0].keys if kind == "key" else parts[0].values).shape[-1], method.bits(kind) or 0
    if CODECS[method.codec].selects and solver is None:
        return [_any_channels(len(keep), n, bits, kind) for keep in keeps]
    made: list[Codec]
    if CODECS[method.codec].selects:
        made = [Channels.keeping(keep, n) for keep in keeps]
    else:
        widths = iter(map(len, keeps))
        made = [c for part in parts for c in _fitted(method, part, kind, list(islice(widths, len(part.keys))))]
    return [as_integers(codec, bits, kind) for codec in made]


@lru_cache(maxsize=1024)
def _any_channels(width: int, n: int, bits: int, kind: Kind) -> Codec:
    """Of a head that keeps so many channels, to count its bytes."""
    return as_integers(Channels.keeping(np.arange(width), n), bits, kind)


def _fitted(method: Method, seen: Observed, kind: Kind, widths: Sequence[int]) -> Sequence[Codec]:
    try:
        return CODECS[method.codec].fit(seen, kind, widths, **method.codec_options)
    except TypeError as error:
        raise InputError(f"codec {method.codec!r} does not take these options ({error})") from None


def _sizes(method: Method, layer: int, parts: Sequence[Observed], kind: Kind) -> list[SubsetProblem]:
    """Problems that only say how many channels there are."""
    n = (parts[0].keys if kind == "key" else parts[0].values).shape[-1]
    zeros, heads = np.zeros((n, n)), sum(len(part.keys) for part in parts)
    return [SubsetProblem(zeros, 0, name=str(HeadName(layer, head, kind))) for head in range(heads)]


def _spectra(method: Method, layer: int, parts: Sequence[Observed], kind: Kind) -> list[SubsetProblem]:
    """One problem of a layer: what each number of its rows saves, by which a budget is shared over layers."""
    saved = CODECS[method.codec].spectrum(parts[0], kind, **method.codec_options)
    return [SubsetProblem(np.diag(saved.cpu().numpy()), 0, name=str(HeadName(layer, 0, kind)))]


def _problems(method: Method, layer: int, parts: Sequence[Observed], kind: Kind) -> list[SubsetProblem]:
    """The graphs of one layer's KV heads, with nothing to prune yet."""
    heads = [each for part in parts for each in _graphs(method, part, kind)]
    return [
        SubsetProblem(w, 0, protected, name=str(HeadName(layer, h, kind))) for h, (w, protected) in enumerate(heads)
    ]


def _graphs(method: Method, seen: Observed, kind: Kind) -> list[tuple[FloatArray, Any]]:
    """Of each head, W and the protected channels, if any are."""
    selection = method.selection
    counted = seen if selection.prunable_only else seen.all_tokens
    protected = _salient(method, [counted], kind)
    name = selection.objective if kind == "key" else selection.value_objective
    weights: FloatArray = counted.once(("graph", kind, name), lambda: _objective(method, kind)(counted).cpu().numpy())
    return list(zip(weights, [None] * len(weights) if protected is None else protected[0], strict=True))


def _objective(method: Method, kind: Kind) -> Any:
    selection = method.selection
    return KEY_OBJECTIVES[selection.objective] if kind == "key" else VALUE_OBJECTIVES[selection.value_objective]


def _salient(method: Method, rows: Sequence[Observed], kind: Kind) -> np.ndarray | None:
    """bool[rows, H, n]: the protected key channels."""
    protection = method.selection.protection
    if protection is None or kind != "key":
        return None
    norms = [double(seen.keys[:, seen.counted]).square().sum(1).sqrt().cpu().numpy() for seen in rows]
    return np.array([[salient_channels(head, protection) for head in row] for row in norms])


# ---------------------------------------------------------------- one layer of a prompt


def _chosen(choice: Choice, rows: Sequence[tuple[Observed, bool]], kind: Kind, n: int) -> Codec:
    """The codec that a method chooses in one layer, [rows, heads]."""
    method, seen = choice.method, [each for each, _ in rows]
    sharing = method.sharing
    prune = prune_count(choice.budget.of(kind), n, up=sharing.rounding == "ceil", align=sharing.align)
    if not CODECS[method.codec].selects or prune == 0:
        heads = len(seen[0].keys)
        fits = [_fitted(method, each, kind, [n - prune] * heads) for each in seen]
        return stacked([stacked([as_integers(c, method.bits(kind) or 0, kind) for c in row]) for row in fits])
    order = _chosen_channels(method, seen, kind, prune)
    return as_integers(Channels(order, n - prune), method.bits(kind) or 0, kind)


def _chosen_channels(method: Method, rows: Sequence[Observed], kind: Kind, prune: int) -> Tensor:
    """int64[rows, H, n]: each head's channels, the kept ones first, both ascending. Waits for no device."""
    counted = rows if method.selection.prunable_only else [seen.all_tokens for seen in rows]
    weights = torch.stack([_objective(method, kind)(seen) for seen in counted])
    salient = _salient(method, counted, kind)
    free = None
    if salient is not None:
        if prune > (most := int((~salient).sum(-1).min())):
            raise InputError(
                f"{prune} channels of each head are to be pruned and protection leaves {most}; prune fewer, or use a "
                "method without protection"
            )
        free = torch.from_numpy(~salient).to(weights.device).flatten(0, 1)
    if method.selection.solver == "independent":
        weights = torch.diag_embed(weights.diagonal(dim1=2, dim2=3))
    picks, _ = forward(weights.flatten(0, 1), prune, free)
    pruned = torch.zeros(weights.shape[:3], dtype=torch.int, device=weights.device)
    pruned = pruned.flatten(0, 1).scatter_(1, picks, 1).view(weights.shape[:3])
    return pruned.argsort(dim=2, stable=True).to(rows[0].keys.device)


def _with_readout(codec: Codec, recipe: ReadoutRecipe, rows: Sequence[tuple[Observed, bool]], kind: Kind) -> Codec:
    """Channels, or integers of channels, with a read-out fitted to each row's compressed tokens as they are stored."""
    inner = getattr(codec, "inner", codec)
    if not isinstance(inner, Channels) or inner.constant is not None or inner.width == inner.n:
        return codec
    about, linear = [], recipe.readout_fit != "mean"
    for row, (seen, old) in enumerate(rows):
        tokens = (seen.keys if kind == "key" else seen.values)[:, seen.counted]
        order = inner.order[min(row, len(inner.order) - 1)]
        if not old:
            tokens = torch.zeros_like(tokens)
        if codec is not inner:  # on what is stored: kept channels as they come back
            kept = order[:, None, : inner.width].expand(*tokens.shape[:2], inner.width)
            tokens = tokens.scatter(2, kept, codec.stored(tokens.gather(2, kept)))
        weights = seen.token_weights if recipe.readout_fit == "attention" else None
        about.append(_ordered(*weighted_moments(tokens, weights, recipe.mixed(kind)), order))
    mean, covariance = (torch.cat(each) for each in zip(*about, strict=True))
    fitted = fit_many(mean, covariance, inner.width, recipe.ridge, linear=linear)
    matrix, constant = (each.view(len(rows), -1, *each.shape[1:]).contiguous() for each in fitted)
    # The mean alone holds no matrix of zeros.
    read = replace(inner, matrix=matrix if linear else None, constant=constant).to(rows[0][0].keys)
    return read if inner is codec else replace(codec, inner=read)  # type: ignore[call-arg]


def _ordered(mean: Tensor, covariance: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [H, n] and covariance [H, n, n] of channels in the order int64[H, n]."""
    order = order.to(mean.device)
    columns = covariance.gather(2, order[:, None].expand(covariance.shape))
    return mean.gather(1, order), columns.gather(1, order[..., None].expand(covariance.shape))
