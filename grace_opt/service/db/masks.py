"""The masks of complete runs; their files are blobs."""

from __future__ import annotations

from sqlalchemy import select

from grace_opt.service.db.database import Database, Row
from grace_opt.service.db.tables import Mask


class MaskStore:
    """Masks by run, budget and solver. They come with the end of their run: `RunStore.finish`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, run: int) -> list[Row]:
        """The masks of a run, by budget and solver."""
        budget = (Mask.ratio, Mask.value_ratio, Mask.budget_bytes)
        return self._database.rows(select(Mask.__table__).where(Mask.run == run).order_by(*budget, Mask.solver))

    def find(self, digest: str) -> Row | None:
        """A mask by the sha256 of its JSON file."""
        return self._database.one(select(Mask.__table__).where(Mask.digest == digest).limit(1))
