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
    """A row of the table of `grace-opt evaluate`."""

    def shown(interval: Mapping[str, float | None] | None) -> str:
        if interval is None:
            return "-"
        if interval["low"] is None:
            return f"{interval['mean']:.4f}"
        return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"

    return {
        "method": record["method"],
        "ratio": record["ratio"] if record["budget_bytes"] is None else f"{record['budget_bytes']:g} B",
        "values": record["value_ratio"] if record["budget_bytes"] is None else "-",
        "KL/token": shown(record["kl"]),
        "NLL rise": f"{record['nll']['mean']:+.4f}",
        "top-1 %": f"{100 * record['top1']:.1f}",
        "needle": shown(record["needle"]),
        "bytes/token": f"{record['bytes_per_token']:.0f} of {record['full_bytes_per_token']:.0f}",
        "documents": record["documents"],
    }
