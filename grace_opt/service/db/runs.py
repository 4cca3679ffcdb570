"""The runs of a service: what was asked for, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, select, update

from grace_opt.records import budget_name, now
from grace_opt.service.db.database import AT_ONCE, Database, Row
from grace_opt.service.db.records import columns
from grace_opt.service.db.tables import UNFINISHED, Mask, Record, Run, State


class QueueFullError(Exception):
    """Too many runs are unfinished."""


class RunStore:
    """Runs by their ids, which are never used again."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(
        self, request: Row, total: int, most: int, submitted_by: str | None, idempotency_key: str | None
    ) -> tuple[Row, bool]:
        """Accept a run; on return it is on disk. With a key that is known: the run that it belongs to, and False.

        Raises:
            QueueFullError: if ``most`` runs are unfinished.
        """
        with self._database.engine.begin() as connection:
            if idempotency_key is not None:
                known = select(Run.__table__).where(Run.idempotency_key == idempotency_key)
                found = connection.execute(known).one_or_none()
                if found is not None:
                    return dict(found._mapping), False
            waiting = connection.execute(select(func.count()).where(Run.state.in_(UNFINISHED))).scalar_one()
            if waiting >= most:
                raise QueueFullError(waiting)
            row = {
                "bundle": request["bundle"],
                "state": State.QUEUED,
                "request": request,
                "total": total,
                "done": 0,
                "reused": 0,
                "submitted_by": submitted_by,
                "idempotency_key": idempotency_key,
                "created": now(),
                "summary": [],
            }
            insert = self._database.insert_new(Run, [row]).returning(Run.id)
            key = connection.execute(insert).scalar_one_or_none()
            if key is None:  # another request with the same key came first
                return dict(connection.execute(known).one()._mapping), False
            return dict(connection.execute(select(Run.__table__).where(Run.id == key)).one()._mapping), True

    def find(self, run: int) -> Row | None:
        """A run by its id."""
        return self._database.one(select(Run.__table__).where(Run.id == run))

    def page(
        self, limit: int, offset: int, states: Sequence[str] = (), bundle: str | None = None
    ) -> tuple[list[Row], int]:
        """Runs, the newest first, and how many there are."""
        query = select(Run.__table__).order_by(Run.id.desc())
        if states:
            query = query.where(Run.state.in_(states))
        if bundle is not None:
            query = query.where(Run.bundle == bundle)
        return self._database.page(query, limit, offset)

    def unfinished(self) -> list[int]:
        """The ids of the runs to work on, the oldest first."""
        query = select(Run.id).where(Run.state.in_(UNFINISHED)).order_by(Run.id)
        return [row["id"] for row in self._database.rows(query)]

    def move(self, run: int, state: State, error: str | None = None) -> bool:
        """Give an unfinished run another state; False if it was not unfinished (cancelled meanwhile, say)."""
        values: Row = {"state": state, "error": error}
        values["started" if state is State.RUNNING else "ended"] = now()
        with self._database.engine.begin() as connection:
            query = update(Run).where(Run.id == run, Run.state.in_(UNFINISHED)).values(values)
            return connection.execute(query).rowcount == 1

    def finish(self, run: int, records: Sequence[Row], masks: Sequence[Row], summary: Sequence[Row]) -> bool:
        """Complete a run: its records with their references, its masks and its summary. False if it was cancelled."""
        with self._database.engine.begin() as connection:
            query = update(Run).where(Run.id == run, Run.state.in_(UNFINISHED))
            values: Row = {"state": State.COMPLETE, "ended": now(), "summary": list(summary)}
            if connection.execute(query.values(values)).rowcount == 0:
                return False
            connection.execute(delete(Record).where(Record.run == run))
            rows = [columns(run, record) for record in records]
            for at in range(0, len(rows), AT_ONCE):
                connection.execute(self._database.insert_new(Record, rows[at : at + AT_ONCE]))
            connection.execute(delete(Mask).where(Mask.run == run))
            if masks:
                named = [{"run": run, "budget": budget_name(mask), **mask} for mask in masks]
                connection.execute(self._database.insert_new(Mask, named))
        return True

    def delete(self, run: int) -> None:
        """Remove a run with its records and masks. Blobs stay: others may share them."""
        with self._database.engine.begin() as connection:
            connection.execute(delete(Run).where(Run.id == run))

    def counts(self) -> dict[str, int]:
        """How many runs there are in each state."""
        found = self._database.rows(select(Run.state, func.count().label("count")).group_by(Run.state))
        return {**dict.fromkeys(map(str, State), 0), **{str(row["state"]): row["count"] for row in found}}
