"""The database of one service: SQLite (in WAL mode, the default) or PostgreSQL. Opened, locked, and asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Executable, Select, create_engine, event, func, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from grace_opt.errors import InputError
from grace_opt.service.db.locks import FileLock
from grace_opt.service.db.outages import ReplacedError, reason
from grace_opt.service.db.tables import Table

Row = dict[str, Any]

ADVISORY_LOCK = 0x67726163  #: of the one server that works on a PostgreSQL database ("grac")
AT_ONCE = 500  #: rows or values in one statement; SQLite allows 32,766 variables
SQLITE = "sqlite:///"  #: what comes after it is a path, letter by letter: ``?``, ``#`` and ``%`` too


class Database:
    """A database that one server at a time works on.

    Args:
        url: a SQLAlchemy URL; of SQLite ``sqlite:///PATH``, in which PATH is taken as it stands.

    Raises:
        InputError: if it is of no database that can be opened.
    """

    def __init__(self, url: str) -> None:
        self._lock: FileLock | Connection | None = None
        try:
            made = _url(url)
            if made.get_backend_name() not in ("sqlite", "postgresql") or made.database in (None, "", ":memory:"):
                raise InputError(f"the storage must be sqlite:///PATH or postgresql://..., got {url!r}")
            self.name = made.render_as_string(hide_password=True)  #: for people
            self.path: Path | None = None  #: of SQLite's file
            if made.get_backend_name() == "sqlite":
                self.path = Path(str(made.database)).absolute()
                self.name = f"{SQLITE}{self.path}"
            self.engine = self._engine(made)
        except (ArgumentError, ModuleNotFoundError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the storage {url!r} is not a database URL that can be used ({error})") from None

    def upgrade(self) -> None:
        """Bring the tables up to date. Raises InputError if it cannot be reached, or a newer grace-opt changed it."""
        from alembic.util.exc import CommandError

        from grace_opt.service.db.migrations import upgrade

        try:
            upgrade(self.engine)
        except SQLAlchemyError as error:
            raise self._away(error) from None
        except CommandError as error:
            raise InputError(f"the storage {self.name} was made by a newer grace-opt ({error}); use that one") from None

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
            SQLAlchemyError: if the database is away, or is not the one that was locked.
        """
        taken = InputError(f"another server works on {self.name}; stop it, or choose another data folder and storage")
        if self.path is not None:
            if self._lock is None:
                self._lock = FileLock(self.path, taken)
            self._require_same_file()
            return
        if isinstance(self._lock, Connection):
            try:
                self._lock.execute(text("SELECT 1"))
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
        lock, self._lock = self._lock, None
        if isinstance(lock, Connection):
            lock.close()
        self.engine.dispose()
        if isinstance(lock, FileLock):  # last: closing any descriptor of a file ends SQLite's own locks on it
            lock.close()

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
        return InputError(f"cannot open the storage {self.name}: {reason(error)}; see that it is there and can be used")

    def _require_same_file(self, *_: object) -> None:
        """Before a server reads or writes: what was removed, or replaced by a copy, takes no more work."""
        if isinstance(self._lock, FileLock) and not self._lock.is_in_place():
            raise ReplacedError(
                f"the database {self.path} was removed or replaced while the service ran; put it back, or restart the "
                "service to go on with what is there now"
            )

    def _engine(self, url: URL) -> Engine:
        if self.path is None:
            return create_engine(url, pool_pre_ping=True, pool_size=10, connect_args=_own_settings(url))
        engine = create_engine(url, connect_args={"timeout": 10})

        @event.listens_for(engine, "connect")
        def _pragmas(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        event.listen(engine, "do_connect", self._require_same_file)  # or SQLite would make an empty file
        event.listen(engine, "checkout", self._require_same_file)
        return engine


def _url(url: str) -> URL:
    if url.startswith(SQLITE):
        return URL.create("sqlite", database=url.removeprefix(SQLITE))
    made = make_url(url)
    if made.get_backend_name() == "sqlite" and made.query:
        raise ArgumentError("a URL of SQLite has no options here; write sqlite:///PATH")
    return made.set(drivername="postgresql+psycopg") if made.drivername in ("postgresql", "postgres") else made


def _own_settings(url: URL) -> dict[str, Any]:
    """What the environment must not decide: PGCLIENTENCODING would turn texts into bytes or refuse them, and
    PGHOSTADDR would send to another server than the URL names."""
    settings: dict[str, Any] = {"connect_timeout": 5, "client_encoding": "utf8"}
    if (url.host or "host" in url.query) and "hostaddr" not in url.query:
        settings["hostaddr"] = ""
    return {name: value for name, value in settings.items() if name not in url.query}
