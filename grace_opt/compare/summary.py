"""What the records of several solvers say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grace_opt.compare.instances import NOT_SUPPORTED
from grace_opt.records import BUDGET
from grace_opt.reports.report import grouped
from grace_opt.solution import OBJECTIVE_SLACK, BoundKind, Limit, Status, relative_gap

Record = dict[str, Any]

PLACE = ("bundle", *BUDGET, "solver")  #: what the records of a row have in common
TIME_SHIFT = 0.01  #: seconds, of the shifted geometric mean


def with_references(records: Sequence[Record], known: Iterable[Record], slack: Mapping[str, float]) -> list[Record]:
    """The records, each with what all of ``known`` say of the same problem (digest).

    Adds ``best_known`` (smallest objective), ``best_bound`` (largest proven lower bound) and ``best_bound_solver``
    (whose), ``over_best`` = (objective - best_known) / |best_known| and ``reference_gap`` = the gap of the objective
    to ``best_bound``. None where there is none. A bound above the best objective by at most ``slack[digest]`` (plus
    `OBJECTIVE_SLACK` of that objective, as in the front end) is rounding, and lowered to it.
    """
    best_known: dict[str, float] = {}
    best_bound: dict[str, tuple[float, str]] = {}
    for record in known:
        digest = record["digest"]
        if record["objective"] is not None:
            best_known[digest] = min(record["objective"], best_known.get(digest, math.inf))
        if record["bound_kind"] == BoundKind.PROVEN and record["lower_bound"] is not None:
            mine = (record["lower_bound"], record["solver"])
            best_bound[digest] = max(best_bound.get(digest, mine), mine, key=lambda pair: pair[0])
    completed = []
    for record in records:
        best = best_known.get(record["digest"])
        bound: float | None = None
        whose: str | None = None
        if record["digest"] in best_bound:
            bound, whose = best_bound[record["digest"]]
            if best is not None and best < bound <= best + slack.get(record["digest"], 0.0) + OBJECTIVE_SLACK * abs(
                best
            ):
                bound = best
        objective, over_best, reference_gap = record["objective"], None, None
        if objective is not None and best is not None:
            over_best = 0.0 if objective == best else _finite((objective - best) / abs(best) if best else math.inf)
        if objective is not None and bound is not None:
            reference_gap = _finite(relative_gap(objective, bound))
        added = {
            "best_known": best,
            "over_best": over_best,
            "best_bound": bound,
            "best_bound_solver": whose,
            "reference_gap": reference_gap,
        }
        completed.append({**record, **added})
    return completed


def summarise(records: Iterable[Record]) -> list[Record]:
    """A row for each bundle, budget and solver, in order of appearance.

    ``gap_mean`` is over the heads with a proven bound of the solver's own, ``reference_gap_mean`` over those with a
    proven bound of any solver. ``time`` is the shifted geometric mean in seconds (shift 10 ms) over the heads where
    the solver gave a selection or came to a limit: a run that hit its limit counts as long as it took.
    ``no_selection`` counts limits that came too early, ``not_supported`` heads that the solver does not take.
    """
    rows = []
    for place, group in grouped(records, *PLACE).items():
        over = [r["over_best"] for r in group if r["over_best"] is not None]
        own = [r["gap"] for r in group if r["gap"] is not None and r["bound_kind"] == BoundKind.PROVEN]
        reference = [r["reference_gap"] for r in group if r["reference_gap"] is not None]
        failed = [r for r in group if r["status"] in (Status.ERROR, Status.NUMERICAL_ERROR)]
        refused = [r for r in group if r["raw_status"] == NOT_SUPPORTED]
        empty = [r for r in group if r["pruned"] is None and r["status"] != Status.ERROR]
        timed = [r for r in group if r["pruned"] is not None or r["limit"] != Limit.NONE]
        rows.append(
            {
                **dict(zip(PLACE, place, strict=True)),
                "heads": len(group),
                "over_best_mean": _mean(over),
                "over_best_max": max(over, default=None),
                "gap_mean": _mean(own),
                "reference_gap_mean": _mean(reference),
                "optimal_share": sum(r["status"] == Status.OPTIMAL for r in group) / len(group),
                "time": shifted_geometric_mean([r["timing_ns"]["total"] / 1e9 for r in timed]),
                "errors": len(failed),
                "no_selection": len(empty) - len(refused),
                "not_supported": len(refused),
            }
        )
    return rows


def shifted_geometric_mean(values: Sequence[float], shift: float = TIME_SHIFT) -> float | None:
    """exp(mean(log(t + shift))) - shift; None of no values."""
    if not values:
        return None
    return math.exp(math.fsum(math.log(value + shift) for value in values) / len(values)) - shift


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
