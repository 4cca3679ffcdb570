"""The graph bundles that a service has."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select

from grace_opt.records import now
from grace_opt.service.db.database import Database, Row
from grace_opt.service.db.tables import Bundle


class BundleStore:
    """Bundles by their digests; each one's file is the blob of that."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, digest: str, name: str, nbytes: int, heads: int, about: Mapping[str, str]) -> Row:
        """Note a bundle whose blob is there; one that is known already stays as it is."""
        row = {"digest": digest, "name": name, "nbytes": nbytes, "heads": heads, "about": dict(about), "created": now()}
        with self._database.engine.begin() as connection:
            connection.execute(self._database.insert_new(Bundle, [row]))
            return dict(connection.execute(select(Bundle.__table__).where(Bundle.digest == digest)).one()._mapping)

    def find(self, digest: str) -> Row | None:
        """A bundle by its digest."""
        return self._database.one(select(Bundle.__table__).where(Bundle.digest == digest))

    def page(self, limit: int, offset: int) -> tuple[list[Row], int]:
        """Bundles, the newest first, and how many there are."""
        query = select(Bundle.__table__).order_by(Bundle.created.desc(), Bundle.digest)
        return self._database.page(query, limit, offset)
