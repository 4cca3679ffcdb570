"""Rows of tables, made of records: short enough for a screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grace_opt.heads import HeadName, Kind
from grace_opt.records import BUDGET


def by_layer(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each layer and kind, of the records of solved heads."""
    rows: dict[tuple[int, Kind], dict[str, Any]] = {}
    for record in records:
        head = HeadName.parse(record["problem"])
        empty = {"layer": f"layers.{head.layer}", "kind": head.kind, "heads": 0, "objective": 0.0}
        row = rows.setdefault((head.layer, head.kind), empty)
        row["heads"] += 1
        row["objective"] += record["objective"]
        row["most"] = max(record["prune"], row.get("most", 0))
        row["least"] = min(record["prune"], row.get("least", record["n"]))
        least = f"{row['least']} to " if row["least"] < row["most"] else ""
        row["pruned"] = f"{least}{row['most']} of {record['n']}"
        row.setdefault("statuses", set()).add(record["status"])
    shown = ("layer", "kind", "heads", "objective", "pruned")
    return [
        {**{name: row[name] for name in shown}, "statuses": ", ".join(sorted(row["statuses"]))} for row in rows.values()
    ]


def summary_columns(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a comparison's table: those that are the same in every row only where they say something."""
    columns = [
        *("heads", "mean over best %", "max over best %", "mean gap %", "gap to best bound %", "optimal %"),
        *("time ms", "errors"),
    ]
    varying = ("bundle", *BUDGET)
    several = [name for name in varying if len({row.get(name) for row in summary}) > 1]
    rare = [name for name in ("no_selection", "not_supported") if any(row[name] for row in summary)]
    return [*several, "solver", *columns, *rare]


def summary_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a comparison's summary, with the columns that are shown: percent, milliseconds."""

    def short(value: float | None) -> str:
        if value is None:
            return "-"
        return "<1e-6" if 0 < value < 1e-6 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    def percent(name: str) -> str:
        return short(None if row[name] is None else 100 * row[name])

    return {
        **row,
        "mean over best %": percent("over_best_mean"),
        "max over best %": percent("over_best_max"),
        "mean gap %": percent("gap_mean"),
        "gap to best bound %": percent("reference_gap_mean"),
        "optimal %": percent("optimal_share"),
        "time ms": short(None if row["time"] is None else 1000 * row["time"]),
    }


def quality_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of `grace-opt evaluate --task kl`."""
    return {
        "method": record["method"],
        "budget": _budget(record),
        "KL/token": _interval(record["kl"], 4),
        "NLL rise": f"{record['nll']['mean']:+.4f}",
        "top-1 %": f"{100 * record['top1']:.1f}",
        "bytes %": _held(record),
        "length": record["length"],
        "documents": record["documents"],
    }


def score_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of `grace-opt evaluate` with other tasks."""
    percent = {name: None if each is None else 100 * each for name, each in record["score"].items()}
    return {
        "task": record["task"] if len(record["tasks"]) == 1 else f"{record['task']}, {len(record['tasks'])} solved",
        "length": record["length"],
        "protocol": record["protocol"],
        "method": record["method"],
        "budget": "-" if record["method"] == "full" else _budget(record),
        "score %": _interval(percent, 1),
        "bytes %": _held(record),
        "prompts": record["prompts"],
        "solved": "yes" if record["solved"] else "no",
    }


def _budget(record: Mapping[str, Any]) -> str:
    if record["budget_share"] is not None:
        return f"share {record['budget_share']:g}"
    if record["budget_bytes"] is not None:
        return f"{record['budget_bytes']:g} B"
    return f"ratio {record['ratio']:g}" + (f", values {record['value_ratio']:g}" if record["value_ratio"] else "")


def _held(record: Mapping[str, Any]) -> str:
    return f"{100 * record['bytes_per_token'] / record['full_bytes_per_token']:.1f}"


def _interval(interval: Mapping[str, float | None], digits: int) -> str:
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
