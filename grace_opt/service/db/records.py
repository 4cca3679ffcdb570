"""The records of all runs: as JSON, with the columns that they are filtered and sorted by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select, update

from grace_opt import records as declared
from grace_opt.service.db.database import AT_ONCE, Database, Row
from grace_opt.service.db.tables import UNFINISHED, Record, Run

SORTS = {
    "id": Record.id,
    "problem": Record.problem,
    "status": Record.status,
    "objective": Record.objective,
    "gap": Record.gap,
    "reference_gap": Record.reference_gap,
    "over_best": Record.over_best,
    "time": Record.time_ns,
}
FIELDS = tuple(name for name in declared.names(declared.Record) if name in Record.__table__.columns)


class RecordStore:
    """Records by their runs. A record that is there already stays as it is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, run: int, records: Sequence[Row], reused: int = 0) -> int:
        """Keep records (with ``bundle``, ``ratio`` and ``limits``) of an unfinished run; returns how many it has now.

        A head that was sent to a worker twice counts once. To a run that was cancelled meanwhile nothing is added.
        """
        rows = [columns(run, record) for record in records]
        open_run = and_(Run.id == run, Run.state.in_(UNFINISHED))
        with self._database.engine.begin() as connection:
            values: Row = {"reused": Run.reused + reused}  # also keeps others from ending the run meanwhile
            if connection.execute(update(Run).where(open_run).values(values)).rowcount == 1:
                for at in range(0, len(rows), AT_ONCE):
                    connection.execute(self._database.insert_new(Record, rows[at : at + AT_ONCE]))
            count = connection.execute(select(func.count()).where(Record.run == run)).scalar_one()
            connection.execute(update(Run).where(Run.id == run).values(done=count))
            return count

    def known(self, digests: Iterable[str], solver: str) -> list[Row]:
        """For each problem (digest) the newest records of a solver that are no errors, one for each way it was run."""
        found: list[Row] = []
        wanted = sorted(set(digests))
        with self._database.engine.connect() as connection:
            for at in range(0, len(wanted), AT_ONCE):
                part = wanted[at : at + AT_ONCE]
                newest = (
                    select(func.max(Record.id))
                    .where(Record.digest.in_(part), Record.solver == solver, Record.status != "error")
                    .group_by(Record.digest, Record.recipe)
                )
                found += map(json.loads, connection.scalars(select(Record.body).where(Record.id.in_(newest))))
        return found

    def all(self, run: int, **filters: Any) -> list[Row]:
        """All records of a run that match, in their order; ``filters`` as of `page`."""
        return [json.loads(body) for body in self.page(run, **filters)[0]]

    def page(
        self,
        run: int,
        *,
        limit: int | None = None,
        offset: int = 0,
        sort: str = "id",
        descending: bool = False,
        **filters: Any,
    ) -> tuple[list[str], int]:
        """Records as JSON texts, and how many match. Missing values sort last.

        ``filters``: column -> the value it must have, None for any.
        """
        column = SORTS[sort]
        where = [Record.run == run]
        where += [getattr(Record, name) == value for name, value in filters.items() if value is not None]
        order: list[ColumnElement[Any]] = [column.desc() if descending else column.asc(), Record.id.asc()]
        query = select(Record.body).where(and_(*where)).order_by(column.is_(None), *order).offset(offset)
        with self._database.engine.connect() as connection:
            bodies = list(connection.scalars(query if limit is None else query.limit(limit)))
            if offset == 0 and (limit is None or len(bodies) < limit):
                return bodies, len(bodies)
            return bodies, connection.execute(select(func.count()).where(and_(*where))).scalar_one()


def columns(run: int, record: Row) -> Row:
    """A record as a row of the table."""
    return {
        "run": run,
        **{name: record.get(name) for name in FIELDS},
        "budget": declared.budget_name(record),
        "recipe": recipe(record),
        "time_ns": record["timing_ns"]["total"],
        "body": json.dumps(record, allow_nan=False, default=str, separators=(",", ":")),
    }


def recipe(record: Row) -> str:
    """sha256 of how a record was made, but for the problem and the solver's name."""
    how = {name: record[name] for name in ("options", "limits", "seed", "threads")}
    return hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest()
