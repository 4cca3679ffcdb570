"""Alembic's migrations of the service's tables.

A new one: change ``tables.py``, then
``alembic -c grace_opt/service/db/migrations/alembic.ini revision --autogenerate -m WHAT``
against a database at the newest version, and read what it made. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, func, select

VERSION = "alembic_version"
EARLIER = ("0001", "0002")  #: versions that were made a statement at a time, on SQLite
OURS = (VERSION, "api_keys", "bundles", "runs", "masks", "records")
UPGRADE_LOCK = 0x6D696772  #: of the one process that upgrades a PostgreSQL database ("migr")


def upgrade(engine: Engine) -> None:
    """Bring the tables up to date, all or nothing. Raises alembic's CommandError if they are newer than this."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with _alone(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A connection in one transaction, which is the only one that changes tables."""
    if engine.dialect.name != "sqlite":
        with engine.begin() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            yield connection
        return
    with engine.connect() as connection:
        # Python's driver begins no transaction for CREATE TABLE: killed in between, half of the tables would stay.
        driver = connection.connection.driver_connection
        assert driver is not None
        before, driver.isolation_level = driver.isolation_level, None
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                _begin_anew(connection)
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")
        finally:
            driver.isolation_level = before


def _begin_anew(connection: Connection) -> None:
    """Drop tables in which nothing is yet: an earlier grace-opt that was killed here may have made half of them."""
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name in OURS or name.startswith("_alembic_tmp_"))
    if not any(_first(connection, table) for table in found.tables.values() if table.name != VERSION):
        version = found.tables.get(VERSION)
        row = None if version is None else _first(connection, version)
        if row is None or row[0] in EARLIER:
            found.drop_all(connection)


def _first(connection: Connection, table: Table) -> Any:
    return connection.execute(select(table).limit(1)).one_or_none()
