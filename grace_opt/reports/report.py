"""report.html of a comparison: one self-contained page, drawn from the records by the script in its template."""

from __future__ import annotations

import bisect
import importlib.resources
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.files import write_text
from grace_opt.heads import HeadName
from grace_opt.problem import SubsetProblem
from grace_opt.records import BUDGET, budget_of, budget_words
from grace_opt.solution import Status, relative_gap

Record = dict[str, Any]

SET_FIELDS = ("bundle", *BUDGET)  #: what the records of a set have in common
SHOWN_HEADS = 24  #: of all bundles together: heads with a channel graph and a trace of their own
EDGES_PER_CHANNEL = 3
TIME_POINTS = 100
OBJECTIVE_DIGITS = 12  #: of objectives and bounds, which often differ late; of all else six
TRACE_POINTS = 200
#: (key, words, how far above the best known objective counts as finished; None: only a proven optimum does)
CRITERIA = (
    ("best", "the best known objective (within 0.0001 %)", 1e-6),
    ("near", "0.1 % above the best known objective", 1e-3),
    ("close", "1 % above the best known objective", 1e-2),
    ("optimal", "a proven optimum", None),
)


def write_report(
    path: str | Path,
    records: Sequence[Record],
    summary: Sequence[Record],
    problems: Mapping[tuple[str, str], SubsetProblem],
    run: Mapping[str, Any],
) -> None:
    """Write the page of `grace_opt.compare`'s records; it needs no network and no other file.

    Args:
        records: with the fields that `grace_opt.compare.with_references` adds; at least one.
        summary: the rows of `grace_opt.compare.summarise`.
        problems: (bundle, head) -> its problem, for the channel graphs.
        run: the entry of run.json.

    Raises:
        InputError: if the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    data = report_data(records, summary, problems, run)
    models = {str(metadata.get("model", "a model not stated")) for metadata in run["bundles"].values()}
    parts = {
        "TITLE": escape(f"Comparison of solvers on {', '.join(sorted(models))}"),
        # "</script>" inside a string would end the script that holds the data.
        "DATA": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "PLOTLY": get_plotlyjs(),
        "CSS": page_part("report.css"),
        "SECTIONS": page_part("sections.html"),
        "JS": page_part("report.js"),
    }
    write_text(path, filled("report.html", parts))


def filled(name: str, parts: Mapping[str, str]) -> str:
    """A page of the package's assets with its parts in their places."""
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], page_part(name))


def page_part(name: str) -> str:
    """A file of the package's ``reports/assets``, which this report and the service's pages are made of."""
    return (importlib.resources.files("grace_opt") / "reports" / "assets" / name).read_text(encoding="utf-8")


def page_sections(*names: str) -> str:
    """The sections of these names, in their order, as HTML."""
    found = re.finditer(r'<section [^>]*id="(\w+)-section">.*?</section>', page_part("sections.html"), re.S)
    html_of = {match[1]: match[0] for match in found}
    return "\n\n".join(html_of[name] for name in names)


def report_data(
    records: Sequence[Record],
    summary: Sequence[Record],
    problems: Mapping[tuple[str, str], SubsetProblem],
    run: Mapping[str, Any],
    shown_heads: int = SHOWN_HEADS,
) -> dict[str, Any]:
    """What the page's script draws: JSON-like, numbers rounded to six digits, objectives to twelve.

    A set is a bundle at a budget. Layouts of channel graphs are O(n^2) an iteration, which is why only ``shown_heads``
    heads have one: all if there are no more; else the first, the hardest and the worst of each layer.
    """
    solvers = list(dict.fromkeys(record["solver"] for record in records))
    by_bundle = grouped(records, "bundle")
    share = max(2, shown_heads // len(by_bundle)) if shown_heads else 0
    shown = {bundle: _shown_heads(group, share) for (bundle,), group in by_bundle.items()}
    sets = []
    rows = grouped(summary, *SET_FIELDS)
    for place, group in grouped(records, *SET_FIELDS).items():
        sets.append(_set(group, rows[place], solvers, shown[group[0]["bundle"]]))
    graphs = {
        bundle: {head: channel_graph(problems[bundle, head]) for head in heads} for bundle, heads in shown.items()
    }
    keys = ("command", "started", "ended", "state", "seed", "threads", "workers", "limits", "solvers", "versions")
    facts = {key: run.get(key) for key in (*keys, "platform", "cpus", "bundles")}
    criteria = [{"key": key, "words": words} for key, words, _ in CRITERIA]
    data = {"run": facts, "solvers": solvers, "sets": sets, "graphs": graphs, "criteria": criteria}
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return plain


def performance_profile(
    records: Iterable[Record], finished: Callable[[Record], bool]
) -> tuple[dict[str, list[float]], int]:
    """Performance ratios of Dolan and More (Mathematical Programming 91, 2002), and the number of heads.

    For each solver the sorted r = t / (least t of any solver on that head), over the heads that it finished; on a
    head that it did not finish r is infinite and left out. The profile rises by 1 / heads at each r.
    """
    by_head = grouped(records, "problem")
    ratios: dict[str, list[float]] = {}
    for group in by_head.values():
        # A clock that reads 0 would make the others infinitely slow.
        times = {r["solver"]: max(r["timing_ns"]["total"], 1000) for r in group if finished(r)}
        for record in group:
            found = ratios.setdefault(record["solver"], [])
            if record["solver"] in times:
                found.append(times[record["solver"]] / min(times.values()))
    return {solver: sorted(found) for solver, found in ratios.items()}, len(by_head)


def gap_over_time(
    records: Iterable[Record], times: Sequence[float], measure: Callable[[Record, float, float], float]
) -> dict[str, list[float]]:
    """For each solver the median over its heads of ``measure(record, objective, bound)`` at each of ``times`` (s).

    Objective and bound are those of the record's steps at that time; the value is infinite before the first of them.
    """
    medians = {}
    for (solver,), group in grouped(records, "solver").items():
        curves = []
        for record in group:
            points = steps(record)
            starts = [time for time, _, _ in points]
            values = [math.inf, *(measure(record, objective, bound) for _, objective, bound in points)]
            curves.append([values[bisect.bisect_right(starts, time)] for time in times])
        # Of an even number the upper one of the two in the middle: a mean with infinity says nothing.
        medians[solver] = [sorted(column)[len(column) // 2] for column in zip(*curves, strict=True)]
    return medians


def steps(record: Record) -> list[tuple[float, float, float]]:
    """(seconds, objective, lower bound) of the record's trace, then of the end of its run; infinite where none."""
    end = record["timing_ns"]["total"] / 1e9
    points = [point for point in record["trace"] if point[0] is not None and point[0] < end]
    points.append([end, record["objective"], record["lower_bound"]])
    return [
        (time, math.inf if objective is None else objective, -math.inf if bound is None else bound)
        for time, objective, bound in points
    ]


def own_gap(record: Record, objective: float, bound: float) -> float:
    """The gap to the solver's own bound, if that is proven."""
    return relative_gap(objective, bound) if record["bound_kind"] == "proven" else math.inf


def over_best(record: Record, objective: float, bound: float) -> float:
    """How far the objective is above the best known one."""
    best = record["best_known"]
    if objective == best:
        return 0.0
    return (objective - best) / abs(best) if best else math.inf


def channel_graph(problem: SubsetProblem) -> dict[str, Any]:
    """The layout of a head's channels and its strongest edges.

    An edge's strength is |W_ij| / sqrt(W_ii W_jj), which does not depend on the channels' scales; each channel
    keeps its `EDGES_PER_CHANNEL` strongest. Positions are networkx's spring layout with a fixed seed.

    Returns:
        x, y (in [-1, 1]), own (W_ii), protected (indices), edges ([i, j, W_ij > 0], flat).
    """
    import networkx

    diagonal = np.diagonal(problem.weights)
    scale = np.sqrt(np.where(diagonal > 0, diagonal, np.inf))
    strength = np.abs(problem.weights) / np.outer(scale, scale)
    np.fill_diagonal(strength, -1.0)
    nearest = np.argsort(-strength, axis=1, kind="stable")[:, : min(EDGES_PER_CHANNEL, problem.n - 1)]
    pairs = sorted({(min(i, int(j)), max(i, int(j))) for i in range(problem.n) for j in nearest[i]})
    graph: networkx.Graph[int] = networkx.Graph()
    graph.add_nodes_from(range(problem.n))
    graph.add_weighted_edges_from((i, j, float(strength[i, j])) for i, j in pairs)
    layout = networkx.spring_layout(graph, seed=0, iterations=80)
    places = np.array([layout[i] for i in range(problem.n)])
    protected = [] if problem.protected is None else np.flatnonzero(problem.protected).tolist()
    return {
        "x": [round(float(x), 3) for x in places[:, 0]],
        "y": [round(float(y), 3) for y in places[:, 1]],
        "own": [_short(float(value)) for value in diagonal],
        "protected": protected,
        "edges": [number for i, j in pairs for number in (i, j, int(problem.weights[i, j] > 0))],
    }


def _set(
    records: Sequence[Record],
    summary: Sequence[Record],
    solvers: Sequence[str],
    shown: Sequence[str],
) -> dict[str, Any]:
    """All that is drawn of one bundle at one budget."""
    heads = list(dict.fromkeys(record["problem"] for record in records))
    places = [HeadName.parse(head) for head in heads]
    several_kinds = len({place.kind for place in places}) > 1
    number, solver_number = {head: i for i, head in enumerate(heads)}, {name: i for i, name in enumerate(solvers)}
    rows = [_row(record, number[record["problem"]], solver_number[record["solver"]]) for record in records]
    profiles = {}
    for key, _, above in CRITERIA:
        ratios, count = performance_profile(records, _finished(above))
        profiles[key] = {"heads": count, "ratios": {name: [_short(r) for r in found] for name, found in ratios.items()}}

    ends = [time for record in records for time, _, _ in steps(record) if time > 0]
    times = np.geomspace(max(1e-6, min(ends, default=1e-6)), max(ends, default=1.0), TIME_POINTS).tolist()
    times[-1] = max(ends, default=1.0)  # the last run's end itself, whatever the rounding
    medians = {
        name: {solver: [_short(value) for value in curve] for solver, curve in found.items()}
        for name, found in (
            ("own", gap_over_time(records, times, own_gap)),
            ("best", gap_over_time(records, times, over_best)),
        )
    }
    details: dict[str, dict[str, Any]] = defaultdict(dict)
    for record in records:
        if record["problem"] in shown:
            details[record["problem"]][record["solver"]] = {
                "pruned": record["pruned"],
                "trace": [
                    [
                        _short(time),
                        _short(own_gap(record, *point)),
                        _short(over_best(record, *point)),
                        *(_short(value, OBJECTIVE_DIGITS) for value in point),
                    ]
                    for time, *point in _thinned(steps(record))
                ],
            }
    return {
        "bundle": records[0]["bundle"],
        "ratio": records[0]["ratio"],
        "budget": budget_words(records[0]),
        "query": {name: value for name, value in budget_of(records[0]).items() if value is not None},
        "sizes": sorted({(record["n"], record["prune"]) for record in records}),
        "heads": heads,
        "layers": [place.layer for place in places],
        "columns": [f"{place.kv_head} {place.kind}" if several_kinds else str(place.kv_head) for place in places],
        "summary": [{key: _short(value) for key, value in row.items()} for row in summary],
        "rows": rows,
        "profiles": profiles,
        "time": {"times": [_short(time) for time in times], **medians},
        "details": details,
    }


def _row(record: Record, head: int, solver: int) -> list[Any]:
    """A record as the page's tables and maps read it; the order is that of FIELDS in the template."""
    names = ("bound_kind", "gap", "over_best", "reference_gap")
    values = [record[name] for name in names]
    objectives = [_short(record[name], OBJECTIVE_DIGITS) for name in ("objective", "lower_bound")]
    milliseconds = record["timing_ns"]["total"] / 1e6
    more = [record["best_bound_solver"], milliseconds, record["nodes"], record["iterations"]]
    return [
        head,
        solver,
        record["status"],
        record["limit"],
        *objectives,
        *(_short(value) for value in [*values, *more]),
        "; ".join(record["warnings"])[:200],
        _bits(record),
    ]


def _bits(record: Record) -> str | None:
    """The selection as ``n:digits``: a hexadecimal digit for four channels, 1 where pruned."""
    if record["pruned"] is None:
        return None
    channels = np.zeros(record["n"], np.uint8)
    channels[record["pruned"]] = 1
    return f"{record['n']}:{np.packbits(channels).tobytes().hex()}"


def _finished(above: float | None) -> Callable[[Record], bool]:
    """Whether a run found a proven optimum, or a selection within ``above`` of the best known one."""
    allowed = -math.inf if above is None else above
    return lambda r: bool(r["status"] == Status.OPTIMAL or (r["over_best"] is not None and r["over_best"] <= allowed))


def _shown_heads(records: Sequence[Record], count: int) -> list[str]:
    by_head = {head: group for (head,), group in grouped(records, "problem").items()}
    if len(by_head) <= count:
        return list(by_head)

    def worst(head: str) -> float:
        return max(r["over_best"] or 0.0 for r in by_head[head])

    def hardness(head: str) -> tuple[float, float]:
        gaps = [r["reference_gap"] for r in by_head[head] if r["reference_gap"] is not None]
        return min(gaps, default=math.inf), max(r["timing_ns"]["total"] for r in by_head[head])

    layers: dict[int, list[str]] = defaultdict(list)
    for head in by_head:
        layers[HeadName.parse(head).layer].append(head)
    worst_of_layers = sorted((max(heads, key=worst) for heads in layers.values()), key=worst, reverse=True)
    chosen = dict.fromkeys([next(iter(by_head)), max(by_head, key=hardness), *worst_of_layers])
    kept = set(list(chosen)[:count])
    return [head for head in by_head if head in kept]


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most about `TRACE_POINTS` of them, the last one among them."""
    stride = len(points) // TRACE_POINTS + 1
    return [point for i, point in enumerate(points) if i % stride == 0 or i == len(points) - 1]


def _short(value: Any, digits: int = 6) -> Any:
    """A few significant digits; None for what is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records by their values of the named fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record.get(name) for name in names)].append(record)  # older records name no budget but the ratio
    return groups
