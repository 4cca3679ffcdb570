"""API keys."""

from __future__ import annotations

import hashlib

from sqlalchemy import delete, select

from grace_opt.errors import InputError
from grace_opt.records import now
from grace_opt.service.db.database import Database, Row
from grace_opt.service.db.tables import ApiKey


class KeyStore:
    """API keys by their names; only their sha256 is kept."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, key: str, scope: str) -> None:
        """Note an API key. Raises InputError if the name is taken."""
        row = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scope": scope, "created": now()}
        with self._database.engine.begin() as connection:
            if connection.execute(self._database.insert_new(ApiKey, [row])).rowcount != 1:
                raise InputError(f"there is a key {name!r} already; remove it first, or choose another name")

    def remove(self, name: str) -> None:
        """Forget an API key. Raises InputError if there is none of that name."""
        with self._database.engine.begin() as connection:
            if connection.execute(delete(ApiKey).where(ApiKey.name == name)).rowcount != 1:
                raise InputError(f"there is no key {name!r}; grace-opt keys list shows them")

    def all(self) -> list[Row]:
        """Name, sha256, scope and age of all API keys."""
        return self._database.rows(select(ApiKey.__table__).order_by(ApiKey.name))
