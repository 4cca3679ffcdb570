"""records.jsonl, and which of its records need not be made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from grace_opt.compare.instances import NOT_SUPPORTED, Instance, limits_of, place_of, refusal
from grace_opt.errors import InputError
from grace_opt.files import json_text
from grace_opt.reading import parsed
from grace_opt.records import InstanceRecord, check
from grace_opt.solution import Limit, Limits, Solver, Status
from grace_opt.solve import options_of

Record = dict[str, Any]


class RecordsFile:
    """records.jsonl: one JSON object a line, each written when its head is finished. Never rewritten.

    A kill loses at most the line that was being written: such a torn last line is dropped, with a remark. One
    process at a time; the lock goes with the process, however that ends.
    """

    def __init__(self, path: Path, remark: Callable[[str], None]) -> None:
        self.path = path
        self.records: list[Record] = []
        try:
            self._file = path.open("a+b", buffering=0)  # nothing is left over to fail again when it is closed
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
        try:
            self._lock()
            self._read(remark)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Record) -> Record:
        """Add a record to the end of the file; it comes back."""
        line = json_text(record, default=str).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; free some space") from error
        self.records.append(record)
        return record

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another comparison is writing {self.path}; wait for it, or choose another folder"
            ) from None

    def _read(self, remark: Callable[[str], None]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                found = parsed(line)
                check(InstanceRecord, line)
            except InputError as error:
                raise InputError(
                    f"{self.path}, line {number}, is not a record ({error}); delete that line, or write "
                    "to another folder"
                ) from None
            self.records.append(found)
        self.loaded = len(self.records)
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
            remark(f"{self.path}: the last line was cut off and is dropped; its head is solved again")


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
