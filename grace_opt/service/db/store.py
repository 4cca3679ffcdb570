"""What the service knows: bundles, runs, records, masks and API keys in a database, files by their sha256 in a folder.

SQLite (in WAL mode, the default) or PostgreSQL. Every method is one transaction. Methods raise what SQLAlchemy raises
when the database is away or full; `problems` makes 503 and 507 of it, and the runner waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    and_,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from grace_opt import records as declared
from grace_opt.compare.compare import now
from grace_opt.errors import InputError
from grace_opt.records import budget_name, names
from grace_opt.service.db.tables import UNFINISHED, ApiKey, Bundle, Mask, Record, Run, State, Table

Row = dict[str, Any]

ADVISORY_LOCK = 0x67726163  #: of the one server that works on a PostgreSQL database ("grac")
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
RECORDED = tuple(name for name in names(declared.Record) if name in Record.__table__.columns)
DIGESTS_AT_ONCE = 500  #: SQLite allows 32,766 variables


class Store:
    """The database and the files of one service.

    Args:
        folder: data folder; made if need be. Holds ``blobs/`` and, with SQLite, the database.
        url: a SQLAlchemy URL; ``sqlite:///FOLDER/grace-opt.db`` if None.

    Raises:
        InputError: if the folder cannot be written, or the URL is of no database that can be opened.
    """

    def __init__(self, folder: str | Path, url: str | None = None) -> None:
        self.folder = Path(folder).resolve()
        try:
            for part in ("blobs", "tmp", "bundles"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot use the data folder {self.folder}: {error.strerror}; choose another one"
            ) from error
        try:
            self.url = make_url(url or f"sqlite:///{self.folder / 'grace-opt.db'}")
            if self.url.drivername in ("postgresql", "postgres"):
                self.url = self.url.set(drivername="postgresql+psycopg")
            self.engine = _engine(self.url)
        except (ArgumentError, ModuleNotFoundError) as error:
            raise InputError(f"the storage {url!r} is not a database URL that can be used ({error})") from None
        in_memory = self.engine.dialect.name == "sqlite" and self.url.database in (None, "", ":memory:")
        if in_memory or self.engine.dialect.name not in ("sqlite", "postgresql"):
            raise InputError(f"the storage must be sqlite:///PATH or postgresql://..., got {url!r}")
        self._lock: BinaryIO | Connection | None = None

    def open(self, *, alone: bool = True) -> None:
        """Take the database for this process (if ``alone``) and bring its tables up to date.

        Raises:
            InputError: if another server works on it, it cannot be reached, or a newer grace-opt has changed it.
        """
        from alembic.util.exc import CommandError

        from grace_opt.service.db.migrations import upgrade

        try:
            if alone:
                self.hold()
                self._clear()
            upgrade(self.engine)
        except SQLAlchemyError as error:
            self.close()
            reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            raise InputError(f"cannot open the storage {self.url!r}: {reason}") from None
        except CommandError as error:
            self.close()
            raise InputError(
                f"the storage {self.url!r} was made by a newer grace-opt ({error}); use that one"
            ) from None

    def hold(self) -> None:
        """Make sure that this process is the database's only server. Raises InputError if there is another one."""
        taken = InputError(f"another server works on {self.url!r}; stop it, or choose another data folder and storage")
        if self.engine.dialect.name == "sqlite":
            if self._lock is None:
                self._lock = _locked(Path(f"{self.url.database}.lock"), taken)
            return
        if self._lock is not None:
            try:
                self._lock.execute(text("SELECT 1"))  # type: ignore[union-attr]
                return
            except SQLAlchemyError:  # the lock went with the connection
                self._lock.close()
                self._lock = None
        connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not connection.execute(select(func.pg_try_advisory_lock(ADVISORY_LOCK))).scalar():
            connection.close()
            raise taken
        self._lock = connection

    def close(self) -> None:
        """Let the database go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self.engine.dispose()

    # ---------------------------------------------------------------- files

    def blob(self, digest: str) -> Path:
        """Where the file with a sha256 lies."""
        return self.folder / "blobs" / digest[:2] / digest[2:]

    def put(self, content: bytes) -> str:
        """Keep a file; returns its sha256. Raises OSError (a full disk)."""
        digest = hashlib.sha256(content).hexdigest()
        temporary = self.folder / "tmp" / f"{digest}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                file.write(content)
            self.adopt(temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    def adopt(self, temporary: Path, digest: str) -> None:
        """Make a file of the data folder the blob of its digest: on disk first, then under its name."""
        target = self.blob(digest)
        target.parent.mkdir(exist_ok=True)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)

    # ---------------------------------------------------------------- bundles

    def add_bundle(self, digest: str, name: str, nbytes: int, heads: int, about: Mapping[str, str]) -> Row:
        """Note a bundle whose blob is there; one that is known already stays as it is."""
        row = {"digest": digest, "name": name, "nbytes": nbytes, "heads": heads, "about": dict(about), "created": now()}
        with self.engine.begin() as connection:
            connection.execute(self._insert_new(Bundle, [row]))
            return dict(connection.execute(select(Bundle.__table__).where(Bundle.digest == digest)).one()._mapping)

    def bundle(self, digest: str) -> Row | None:
        """A bundle by its digest."""
        return self._one(select(Bundle.__table__).where(Bundle.digest == digest))

    def bundles(self, limit: int, offset: int) -> tuple[list[Row], int]:
        """Bundles, the newest first, and how many there are."""
        return self._page(select(Bundle.__table__).order_by(Bundle.created.desc(), Bundle.digest), limit, offset)

    # ---------------------------------------------------------------- runs

    def submit(
        self, request: Row, total: int, most: int, submitted_by: str | None, idempotency_key: str | None
    ) -> tuple[Row, bool]:
        """Accept a run; on return it is on disk. With a key that is known: the run that it belongs to, and False.

        Raises:
            QueueFullError: if ``most`` runs are unfinished.
        """
        with self.engine.begin() as connection:
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
            key = connection.execute(self._insert_new(Run, [row]).returning(Run.id)).scalar_one_or_none()
            if key is None:  # another request with the same key came first
                return dict(connection.execute(known).one()._mapping), False
            return dict(connection.execute(select(Run.__table__).where(Run.id == key)).one()._mapping), True

    def run(self, key: int) -> Row | None:
        """A run by its id."""
        return self._one(select(Run.__table__).where(Run.id == key))

    def runs(
        self, limit: int, offset: int, states: Sequence[str] = (), bundle: str | None = None
    ) -> tuple[list[Row], int]:
        """Runs, the newest first, and how many there are."""
        query = select(Run.__table__).order_by(Run.id.desc())
        if states:
            query = query.where(Run.state.in_(states))
        if bundle is not None:
            query = query.where(Run.bundle == bundle)
        return self._page(query, limit, offset)

    def unfinished(self) -> list[Row]:
        """The runs to work on, the oldest first."""
        with self.engine.connect() as connection:
            query = select(Run.__table__).where(Run.state.in_(UNFINISHED)).order_by(Run.id)
            return [dict(row._mapping) for row in connection.execute(query)]

    def move(self, key: int, state: State, error: str | None = None) -> bool:
        """Give an unfinished run another state; False if it was not unfinished (cancelled meanwhile, say)."""
        values: Row = {"state": state, "error": error}
        values["started" if state is State.RUNNING else "ended"] = now()
        with self.engine.begin() as connection:
            query = update(Run).where(Run.id == key, Run.state.in_(UNFINISHED)).values(values)
            return connection.execute(query).rowcount == 1

    def delete(self, key: int) -> None:
        """Remove a run with its records and masks. Blobs stay: others may share them."""
        with self.engine.begin() as connection:
            connection.execute(delete(Run).where(Run.id == key))

    # ---------------------------------------------------------------- records

    def add_records(self, run: int, records: Sequence[Row], reused: int = 0) -> int:
        """Keep records (with ``bundle``, ``ratio`` and ``limits``) of an unfinished run; returns how many it has now.

        A record that is there already stays as it is: a head that was sent to a worker twice counts once. To a run
        that was cancelled meanwhile nothing is added.
        """
        rows = [_columns(run, record) for record in records]
        open_run = and_(Run.id == run, Run.state.in_(UNFINISHED))
        with self.engine.begin() as connection:
            values: Row = {"reused": Run.reused + reused}  # also keeps others from ending the run meanwhile
            if connection.execute(update(Run).where(open_run).values(values)).rowcount == 1:
                for at in range(0, len(rows), DIGESTS_AT_ONCE):
                    connection.execute(self._insert_new(Record, rows[at : at + DIGESTS_AT_ONCE]))
            count = connection.execute(select(func.count()).where(Record.run == run)).scalar_one()
            connection.execute(update(Run).where(Run.id == run).values(done=count))
            return count

    def known(self, digests: Iterable[str], solver: str) -> list[Row]:
        """For each problem (digest) the newest records of a solver that are no errors, one for each way it was run."""
        found: list[Row] = []
        wanted = sorted(set(digests))
        with self.engine.connect() as connection:
            for at in range(0, len(wanted), DIGESTS_AT_ONCE):
                part = wanted[at : at + DIGESTS_AT_ONCE]
                newest = (
                    select(func.max(Record.id))
                    .where(Record.digest.in_(part), Record.solver == solver, Record.status != "error")
                    .group_by(Record.digest, Record.recipe)
                )
                found += map(json.loads, connection.scalars(select(Record.body).where(Record.id.in_(newest))))
        return found

    def finish(self, run: int, records: Sequence[Row], masks: Sequence[Row], summary: Sequence[Row]) -> bool:
        """Complete a run: its records with their references, its masks and its summary. False if it was cancelled."""
        with self.engine.begin() as connection:
            query = update(Run).where(Run.id == run, Run.state.in_(UNFINISHED))
            values: Row = {"state": State.COMPLETE, "ended": now(), "summary": list(summary)}
            if connection.execute(query.values(values)).rowcount == 0:
                return False
            connection.execute(delete(Record).where(Record.run == run))
            rows = [_columns(run, record) for record in records]
            for at in range(0, len(rows), DIGESTS_AT_ONCE):
                connection.execute(self._insert_new(Record, rows[at : at + DIGESTS_AT_ONCE]))
            connection.execute(delete(Mask).where(Mask.run == run))
            if masks:
                connection.execute(
                    self._insert_new(Mask, [{"run": run, "budget": budget_name(mask), **mask} for mask in masks])
                )
        return True

    def records(
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
        with self.engine.connect() as connection:
            bodies = list(connection.scalars(query if limit is None else query.limit(limit)))
            if offset == 0 and (limit is None or len(bodies) < limit):
                return bodies, len(bodies)
            return bodies, connection.execute(select(func.count()).where(and_(*where))).scalar_one()

    # ---------------------------------------------------------------- masks and keys

    def masks(self, run: int) -> list[Row]:
        """The masks of a run, by ratio and solver."""
        with self.engine.connect() as connection:
            query = select(Mask.__table__).where(Mask.run == run).order_by(Mask.ratio, Mask.budget_bytes, Mask.solver)
            return [dict(row._mapping) for row in connection.execute(query)]

    def mask(self, digest: str) -> Row | None:
        """A mask by the sha256 of its JSON file."""
        return self._one(select(Mask.__table__).where(Mask.digest == digest).limit(1))

    def add_key(self, name: str, key: str, scope: str) -> None:
        """Note an API key. Raises InputError if the name is taken."""
        row = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scope": scope, "created": now()}
        with self.engine.begin() as connection:
            if connection.execute(self._insert_new(ApiKey, [row])).rowcount != 1:
                raise InputError(f"there is a key {name!r} already; remove it first, or choose another name")

    def remove_key(self, name: str) -> None:
        """Forget an API key. Raises InputError if there is none of that name."""
        with self.engine.begin() as connection:
            if connection.execute(delete(ApiKey).where(ApiKey.name == name)).rowcount != 1:
                raise InputError(f"there is no key {name!r}; grace-opt keys list shows them")

    def api_keys(self) -> list[Row]:
        """Name, sha256, scope and age of all API keys."""
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(select(ApiKey.__table__).order_by(ApiKey.name))]

    def counts(self) -> dict[str, int]:
        """How many runs there are in each state."""
        with self.engine.connect() as connection:
            found = connection.execute(select(Run.state, func.count()).group_by(Run.state)).all()
        return {**dict.fromkeys(map(str, State), 0), **{str(state): count for state, count in found}}

    # ---------------------------------------------------------------- inside

    def _clear(self) -> None:
        """Remove what a server that was killed has left half done."""
        for old in (self.folder / "tmp").iterdir():
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def _one(self, query: Any) -> Row | None:
        with self.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else dict(row._mapping)

    def _page(self, query: Any, limit: int, offset: int) -> tuple[list[Row], int]:
        with self.engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query.limit(limit).offset(offset))]
            total = connection.execute(select(func.count()).select_from(query.order_by(None).subquery())).scalar_one()
        return rows, total

    def _insert_new(self, table: type[Table], rows: Sequence[Row]) -> Any:
        """INSERT that leaves alone what is there already."""
        insert = sqlite.insert if self.engine.dialect.name == "sqlite" else postgresql.insert
        return insert(table).values(list(rows)).on_conflict_do_nothing()


class QueueFullError(Exception):
    """Too many runs are unfinished."""


def recipe(record: Row) -> str:
    """sha256 of how a record was made, but for the problem and the solver's name."""
    how = {name: record[name] for name in ("options", "limits", "seed", "threads")}
    return hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest()


def _columns(run: int, record: Row) -> Row:
    return {
        "run": run,
        **{name: record.get(name) for name in RECORDED},
        "budget": budget_name(record),
        "recipe": recipe(record),
        "time_ns": record["timing_ns"]["total"],
        "body": json.dumps(record, allow_nan=False, default=str, separators=(",", ":")),
    }


def _engine(url: Any) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, pool_size=10, connect_args={"connect_timeout": 5})
    engine = create_engine(url, connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def _locked(path: Path, taken: InputError) -> BinaryIO:
    """A file that only one process can hold; the lock goes with the process, however that ends."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise taken from None
    return file


@contextmanager
def opened(folder: str | Path, url: str | None = None, *, alone: bool = True) -> Iterator[Store]:
    """A store, opened and closed."""
    store = Store(folder, url)
    try:
        store.open(alone=alone)
        yield store
    finally:
        store.close()
