"""From a calibrated bundle to the problems of its heads, and from their solutions to a mask."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.compression import method as methods
from grace_opt.compression.budget import Allotment, Budget, within_share
from grace_opt.compression.method import METHODS, Method, Windows
from grace_opt.compression.plugins import CODECS
from grace_opt.compression.readout import READOUT_SCOPES, ReadoutRecipe, bundle_moments, fit
from grace_opt.errors import InputError
from grace_opt.graphs.bundle import GraphBundle, HeadGraph
from grace_opt.heads import KINDS, Kind
from grace_opt.problem import SubsetProblem
from grace_opt.solution import Solution

if TYPE_CHECKING:  # torch is loaded for masks only: problems are made without it
    from grace_opt.compression.codec import Codec
    from grace_opt.compression.mask import KVMask
    from grace_opt.compression.plan import CachePlan, LayerPlan


ITEMSIZE = 2  #: bytes of a number in the caches that budgets in bytes are of
#: options of methods that only a prompt has a use for
OF_PROMPTS = (
    *("objective", "value_objective", "prunable_only", "solver"),
    *("tokens", "token_options", "token_share", "token_weight"),
)


def require_effect(method: Method, given: Collection[str], budgets: Sequence[Budget]) -> None:
    """As `grace_opt.compression.method.require_effect`, and for the options that have none on a bundle."""
    for name in OF_PROMPTS:
        if name in given:
            cure = "give --solver" if name == "solver" else "calibrate, evaluate and generate have it"
            raise InputError(f"the method's option {name} is for prompts, and has no effect on a bundle; {cure}")
    _require_all_tokens(method)
    methods.require_effect(method, given, budgets)


def _require_all_tokens(method: Method) -> None:
    if method.tokens is not None and method.codec != "whole":
        raise InputError(
            f"tokens are chosen from a prompt, and a bundle has none, so {method.tokens!r} has nothing to look at; "
            "leave it out of the method's name, or use grace-opt evaluate or generate"
        )


def problems_of(
    bundle: GraphBundle,
    method: Method,
    budget: Budget,
    *,
    readout_scope: str = "none",
    recent_window: int | None = None,
    sinks: int | None = None,
) -> list[SubsetProblem]:
    """A problem for each head of a bundle, in its order, that prunes what the budget allots to it.

    The method's protection says whether the bundle's protected channels are kept. A budget in bytes is of a cache of
    16-bit numbers. A share counts what `mask_from_solutions` makes whole for the other arguments. Raises InputError as
    `allot` does, for a share that cannot be reached, if a ratio prunes more than is prunable, and for a method that
    selects no channels.
    """
    if method.codec != "channels" and not CODECS[method.codec].selects:
        raise InputError(
            f"a method whose codec is {method.codec!r} selects no channels, so there is nothing to solve; use "
            "grace-opt evaluate, or grace-opt generate --method"
        )
    _require_all_tokens(method)
    plain = bundle.problems(0.0, protect=method.selection.protection is not None)
    measured = {head.kind for head in bundle.heads}
    if not any(budget.prunes(kind) for kind in measured) and any(budget.prunes(kind) for kind in KINDS):
        raise InputError("the bundle has no graphs of what is to be pruned; calibrate with --value-objective output")
    pruned = _Pruned(bundle, method, budget, plain)
    if budget.share is None:
        return pruned.by(budget)
    from grace_opt.compression.pays import held_bytes

    windows, recipe = windows_of(bundle, method, recent_window, sinks), _recipe(method, readout_scope)
    shapes, layers = shapes_of(bundle), {head.layer for head in bundle.heads}

    def held(tried: Budget) -> float:
        problems = pruned.by(tried)
        widths = [(head, problem.n - problem.prune) for head, problem in zip(bundle.heads, problems, strict=True)]
        plans = _sized_plans(widths, method, windows, recipe, static=readout_scope == "static")
        return sum(held_bytes(plan, shapes, budget.tokens, ITEMSIZE) for plan in plans)

    full = budget.tokens * len(layers) * ITEMSIZE * sum(map(math.prod, shapes.values()))
    return pruned.by(within_share(budget, held, _whole(bundle, method), full))


class _Pruned:
    """The problems of a bundle, ``plain`` with nothing to prune, under any budget of one kind that is no share."""

    def __init__(self, bundle: GraphBundle, method: Method, like: Budget, plain: Sequence[SubsetProblem]) -> None:
        self.bundle, self.plain = bundle, plain
        problems: dict[Kind, list[SubsetProblem]] = {}
        in_bytes = like.bytes_per_token is not None or like.share is not None
        for head, problem in zip(bundle.heads, plain, strict=True):
            if not in_bytes or like.prunes(head.kind):
                problems.setdefault(head.kind, []).append(problem)
        kv_heads = shapes_of(bundle)["key"][0]
        group = max(1, bundle.integer("num_attention_heads", kv_heads) // kv_heads)
        sizes = {problem.n for heads in problems.values() for problem in heads}
        self.allotment = Allotment(
            problems,
            method.sharing if like.share is None else method.sharing_of_bytes(ITEMSIZE, sizes),
            queries=group * bundle.integer("observation_window", 32, least=1),
            costs=method.channel_bytes(ITEMSIZE),
            whole=_whole(bundle, method),
        )

    def by(self, budget: Budget) -> list[SubsetProblem]:
        left = {kind: iter(each) for kind, each in self.allotment.of(budget).items()}
        return [
            replace(problem, prune=next(left[head.kind])) if head.kind in left else problem
            for head, problem in zip(self.bundle.heads, self.plain, strict=True)
        ]


def _whole(bundle: GraphBundle, method: Method) -> float:
    """Bytes of an old token with nothing pruned, in all layers."""
    costs, shapes = method.channel_bytes(ITEMSIZE), shapes_of(bundle)
    return len({head.layer for head in bundle.heads}) * sum(costs[kind] * math.prod(shapes[kind]) for kind in KINDS)


def shapes_of(bundle: GraphBundle) -> dict[Kind, tuple[int, int]]:
    """KV heads, and channels of a whole key and of a whole value."""
    _, heads = bundle.geometry()
    n = bundle.integer("head_dim", len(bundle.heads[0].weights))
    return {"key": (heads, n), "value": (heads, bundle.integer("value_head_dim", n))}


def _sized_plans(
    widths: Sequence[tuple[HeadGraph, int]],
    method: Method,
    windows: Windows,
    recipe: ReadoutRecipe | None,
    *,
    static: bool,
) -> list[LayerPlan]:
    """Plans that hold as many bytes as those of masks whose heads keep so many channels."""
    from grace_opt.compression.channels import Channels
    from grace_opt.compression.integers import as_integers
    from grace_opt.compression.plan import LayerPlan

    codecs: dict[int, dict[Kind, list[Codec]]] = {}
    for head, width in widths:
        n = len(head.weights)
        zeros = (np.zeros((n - width, width)), np.zeros(n - width)) if static and recipe is not None else ()
        codec = as_integers(Channels.keeping(np.arange(width), n, *zeros), method.bits(head.kind) or 0, head.kind)
        codecs.setdefault(head.layer, {}).setdefault(head.kind, []).append(codec)
    return [LayerPlan(layer, kinds, windows, None if static else recipe) for layer, kinds in codecs.items()]


def windows_of(bundle: GraphBundle, method: Method, recent_window: int | None, sinks: int | None) -> Windows:
    """The mask's, and the graphs' own where they are left out."""
    return replace(
        method.windows,
        recent_window=bundle.integer("recent_window", 32) if recent_window is None else recent_window,
        sinks=bundle.integer("sinks", 4) if sinks is None else sinks,
    )


def _recipe(method: Method, readout_scope: str) -> ReadoutRecipe | None:
    """By which a mask's read-outs are fitted, now or to each prompt."""
    from grace_opt.compression.apply import recipe_of

    if readout_scope not in READOUT_SCOPES:
        raise InputError(f"the read-out scope must be one of {', '.join(READOUT_SCOPES)}, got {readout_scope!r}")
    return recipe_of(method) if readout_scope != "none" else None


def mask_from_solutions(
    bundle: GraphBundle,
    solutions: Sequence[Solution],
    method: Method | None = None,
    *,
    readout_scope: str = "none",
    recent_window: int | None = None,
    sinks: int | None = None,
) -> KVMask:
    """The mask of a solved bundle (its heads and the solutions in the same order), as the method says (`grace-opt` if
    left out).

    ``readout_scope``: ``prefill`` (the method's read-out, fitted to each prompt), ``static`` (fitted now to the
    bundle's moments) or ``none``; a method without a read-out has none. ``recent_window`` and ``sinks`` are those that
    the graphs were made with, if left out. Raises InputError for a layer of which the bundle holds only some KV heads,
    or a head without a solution: none, one of another head's size, or one whose numbers contradict each other.
    """
    from grace_opt.compression.apply import kept_of
    from grace_opt.compression.channels import Channels
    from grace_opt.compression.integers import as_integers
    from grace_opt.compression.plan import CachePlan, LayerPlan

    method = method or METHODS["grace-opt"]
    recipe = _recipe(method, readout_scope)
    _require_solutions(bundle, solutions)
    codecs: dict[int, dict[Kind, dict[int, Codec]]] = {}
    for head, solution in zip(bundle.heads, solutions, strict=True):
        keep, readout = kept_of(solution), None
        if recipe is not None and readout_scope == "static":
            about = bundle_moments(head, _window_tokens(bundle), recipe.mixed(head.kind))
            readout = fit(about, keep, linear=recipe.readout_fit != "mean", ridge=recipe.ridge)
        channels = Channels.keeping(keep, solution.n, *((readout.matrix, readout.constant) if readout else ()))
        codec = as_integers(channels, method.bits(head.kind) or 0, head.kind)
        codecs.setdefault(head.layer, {}).setdefault(head.kind, {})[head.kv_head] = codec
    _, heads = bundle.geometry()
    for layer, kinds in codecs.items():
        for kind, by_head in kinds.items():
            if sorted(by_head) != list(range(heads)):
                raise InputError(
                    f"the bundle holds {kind} graphs of KV heads {sorted(by_head)} of {heads} in layer {layer}"
                )
    windows = windows_of(bundle, method, recent_window, sinks)
    plans = {
        layer: LayerPlan(
            layer,
            {kind: [by_head[h] for h in sorted(by_head)] for kind, by_head in kinds.items()},
            windows,
            recipe if readout_scope == "prefill" else None,
            method.selection.observation_window,
            method.selection.spans,
        )
        for layer, kinds in codecs.items()
    }
    return _mask_of_plan(bundle, CachePlan(plans), solutions, method)


def _require_solutions(bundle: GraphBundle, solutions: Sequence[Solution]) -> None:
    """Raise InputError unless there is a solution of its size for each head."""
    if len(solutions) != len(bundle.heads):
        raise InputError(f"there are {len(solutions)} solutions for the bundle's {len(bundle.heads)} heads; solve each")
    for head, solution in zip(bundle.heads, solutions, strict=True):
        if solution.n != len(head.weights):
            raise InputError(
                f"the solution of {solution.problem} is of {solution.n} channels, and {head.name} has "
                f"{len(head.weights)}; give the solutions in the order of the bundle's heads"
            )


def _window_tokens(bundle: GraphBundle) -> int:
    """How many prunable tokens a window of the bundle has."""
    tokens = bundle.integer("window", 0) - bundle.integer("sinks", 0) - bundle.integer("recent_window", 0)
    if tokens < 1:
        raise InputError("the bundle does not say how many tokens its windows have; calibrate again")
    return tokens


def _mask_of_plan(bundle: GraphBundle, plan: CachePlan, solutions: Sequence[Solution], method: Method) -> KVMask:
    from grace_opt.compression.mask import KVMask

    first = solutions[0]
    gaps = [solution.gap for solution in solutions]
    paired = any(head.groups is not None for head in bundle.heads)
    return KVMask(
        plan=plan,
        structure="rope_pair" if paired else "channel",
        align=method.sharing.align,
        solver={
            "name": first.solver,
            "version": first.solver_version,
            "options": dict(first.options),
            "method": method.options(),
            "objective_sum": math.fsum(solution.objective for solution in solutions),
            "max_gap": max(gaps) if all(map(math.isfinite, gaps)) else None,
            "bound_kinds": sorted({solution.bound_kind.value for solution in solutions}),
        },
        **about_model(bundle),
    )


def about_model(bundle: GraphBundle) -> dict[str, Any]:
    """The fields of a mask that say for which model it is, and on what it was calibrated."""
    about = {key: value for key, value in bundle.metadata.items() if key not in ("format", "version")}
    keys = {len(head.weights) for head in bundle.heads if head.kind == "key"}
    dims = keys or {len(head.weights) for head in bundle.heads}
    if len(dims) > 1:
        raise InputError(f"the bundle's heads have {sorted(dims)} channels; a mask needs them all of one size")
    layers, heads = bundle.geometry()
    return {
        "model": about.get("model", "unknown"),
        "config_sha256": about.get("config_sha256"),
        "num_hidden_layers": layers or None,
        "num_attention_heads": bundle.integer("num_attention_heads", 0) or None,
        "num_key_value_heads": heads,
        "head_dim": dims.pop(),
        "softmax_scale": bundle.positive("softmax_scale"),
        "calibration": about,
    }
