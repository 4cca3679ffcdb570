"""The database of one service: SQLite (in WAL mode, the default) or PostgreSQL. Opened, locked, and asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import URL, Connection, Engine, Executable, Select, create_engine, event, func, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from grace_opt.errors import InputError
from grace_opt.service.db.tables import Table

Row = dict[str, Any]

ADVISORY_LOCK = 0x67726163  #: of the one server that works on a PostgreSQL database ("grac")
AT_ONCE = 500  #: rows or values in one statement; SQLite allows 32,766 variables


class Database:
    """A database that one server at a time works on.

    Args:
        url: a SQLAlchemy URL.

    Raises:
        InputError: if it is of no database that can be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = make_url(url)
            if self.url.drivername in ("postgresql", "postgres"):
                self.url = self.url.set(drivername="postgresql+psycopg")
            self.engine = _engine(self.url)
        except (ArgumentError, ModuleNotFoundError) as error:
            raise InputError(f"the storage {url!r} is not a database URL that can be used ({error})") from None
        in_memory = self.engine.dialect.name == "sqlite" and self.url.database in (None, "", ":memory:")
        if in_memory or self.engine.dialect.name not in ("sqlite", "postgresql"):
            raise InputError(f"the storage must be sqlite:///PATH or postgresql://..., got {url!r}")
        self._lock: BinaryIO | Connection | None = None

    def upgrade(self) -> None:
        """Bring the tables up to date. Raises InputError if it cannot be reached, or a newer grace-opt changed it."""
        from alembic.util.exc import CommandError

        from grace_opt.service.db.migrations import upgrade

        try:
            upgrade(self.engine)
        except SQLAlchemyError as error:
            raise self._away(error) from None
        except CommandError as error:
            raise InputError(
                f"the storage {self.url!r} was made by a newer grace-opt ({error}); use that one"
            ) from None

    def lock(self) -> None:
        """Take the database for this process. Raises InputError if another one has it, or it cannot be reached."""
        try:
            self.hold()
        except SQLAlchemyError as error:
            raise self._away(error) from None

    def hold(self) -> None:
        """See that this process is still the database's only server, and take it again if the lock was lost.

        Raises:
            InputError: if there is another one.
            SQLAlchemyError: if the database is away.
        """
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

    def one(self, query: Executable) -> Row | None:
        """The only row of a query, if there is one."""
        with self.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else dict(row._mapping)

    def rows(self, query: Executable) -> list[Row]:
        """All rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def page(self, query: Select[Any], limit: int, offset: int) -> tuple[list[Row], int]:
        """Some rows of a query, and how many there are."""
        with self.engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query.limit(limit).offset(offset))]
            total = connection.execute(select(func.count()).select_from(query.order_by(None).subquery())).scalar_one()
        return rows, total

    def insert_new(self, table: type[Table], rows: Sequence[Row]) -> Any:
        """INSERT that leaves alone what is there already."""
        insert = sqlite.insert if self.engine.dialect.name == "sqlite" else postgresql.insert
        return insert(table).values(list(rows)).on_conflict_do_nothing()

    def _away(self, error: SQLAlchemyError) -> InputError:
        return InputError(f"cannot open the storage {self.url!r}: {reason(error)}")


def reason(error: BaseException) -> str:
    """The first line of what a database's own driver said, or of any other error."""
    return str(getattr(error, "orig", error)).strip().partition("\n")[0]


def _engine(url: URL) -> Engine:
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
