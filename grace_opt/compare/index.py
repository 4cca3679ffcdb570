"""Which records of a comparison need not be made again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from grace_opt.compare.instances import NOT_SUPPORTED, Instance, limits_of, place_of, refusal
from grace_opt.solution import Limit, Limits, Solver, Status
from grace_opt.solve import options_of

Record = dict[str, Any]


class Index:
    """The newest record of each problem and solver that stands under the limits of this run."""

    def __init__(self, records: Iterable[Record], limits: Limits) -> None:
        self._limits, self._found = limits, dict[tuple[Any, ...], dict[tuple[Any, ...], Record]]()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        if not stands(record, self._limits):
            return
        options = json.dumps(record["options"], sort_keys=True, default=str)
        key = (record["digest"], record["solver"], options, record["seed"], record["threads"])
        self._found.setdefault(key, {})[place_of(record)] = record

    def find(self, instance: Instance, solver: Solver) -> Record | None:
        """The record of this instance, or else of an equal problem."""
        options = json.dumps(options_of(solver), sort_keys=True, default=str)
        key = (instance.digest, solver.name, options, self._limits.seed, self._limits.threads)
        found = self._found.get(key, {})
        record = found.get(place_of(instance.labels)) or next(iter(reversed(found.values())), None)
        if record is not None and record["raw_status"] == NOT_SUPPORTED and not refusal(solver, instance.problem):
            return None  # the solver has learnt it since
        return record


def stands(record: Record, limits: Limits) -> bool:
    """Whether a run under ``limits`` would have ended as the recorded one did, so that it need not be repeated.

    Failures and interrupted runs are repeated. So is a run under other gap tolerances. A run stands under other
    time, node or iteration limits if it used no more than they allow, and the limit that ended it, if one did, is
    unchanged: what ended by itself (a proven optimum, say) stays valid under a larger limit, what hit its time
    limit is run again.
    """
    if record["status"] == Status.ERROR or record["limit"] == Limit.INTERRUPTED:
        return False
    before, now = record["limits"], limits_of(limits)
    if (before["gap_rel"], before["gap_abs"]) != (now["gap_rel"], now["gap_abs"]):
        return False
    used = {"time": record["timing_ns"]["total"] / 1e9, "node": record["nodes"], "iteration": record["iterations"]}
    return all(
        before[f"{kind}_limit"] == now[f"{kind}_limit"]
        or (record["limit"] != kind and (now[f"{kind}_limit"] is None or amount <= now[f"{kind}_limit"]))
        for kind, amount in used.items()
    )
