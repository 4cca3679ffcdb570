"""What a service knows: bundles, runs, records, masks and API keys in a database, files by their sha256 in a folder.

Every method of a store is one transaction. They raise what SQLAlchemy raises when the database is away or full:
`failures` makes 503 and 507 of it, and the runner waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grace_opt.errors import InputError
from grace_opt.service.db.blobs import BlobStore
from grace_opt.service.db.bundles import BundleStore
from grace_opt.service.db.database import SQLITE, Database
from grace_opt.service.db.keys import KeyStore
from grace_opt.service.db.locks import FileLock, FolderLock
from grace_opt.service.db.masks import MaskStore
from grace_opt.service.db.records import RecordStore
from grace_opt.service.db.runs import RunStore

LOCK = ".lock"  #: in the data folder, held by the server that works on it


class Storage:
    """The database and the files of one service, and a store for each thing that it knows.

    Args:
        folder: data folder; made if need be. Holds ``blobs/`` and, with SQLite, the database.
        url: a SQLAlchemy URL; ``sqlite:///FOLDER/grace-opt.db`` if None.

    Raises:
        InputError: if the folder cannot be written, or the URL is of no database that can be opened.
    """

    def __init__(self, folder: str | Path, url: str | None = None) -> None:
        self.folder = Path(folder).resolve()
        self._locks: list[FileLock | FolderLock] = []
        self.offered = self.folder / "bundles"  #: where bundles may lie that are to be registered
        try:
            for part in ("blobs", "tmp", "bundles"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot use the data folder {self.folder}: {error.strerror}; choose another one"
            ) from error
        self.database = Database(url or f"{SQLITE}{self.folder / 'grace-opt.db'}")
        self.blobs = BlobStore(self.folder)
        self.bundles = BundleStore(self.database)
        self.runs = RunStore(self.database)
        self.records = RecordStore(self.database)
        self.masks = MaskStore(self.database)
        self.keys = KeyStore(self.database)

    def open(self, *, alone: bool = True) -> None:
        """Take the database and the folder for this process (if ``alone``), and bring the tables up to date.

        Raises:
            InputError: if another server works on either, one cannot be used, or a newer grace-opt has changed it.
        """
        try:
            if alone:
                self.database.lock()
                self._lock()
                self.blobs.clear()
            self.database.upgrade()
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Let the database and the folder go."""
        self.database.close()
        while self._locks:
            self._locks.pop().close()

    def _lock(self) -> None:
        """What is half done here is cleared at the start, so it must be nobody else's, under whatever name."""
        taken = InputError(f"another server works on the data folder {self.folder}; stop it, or choose another --data")
        self._locks.append(FileLock(self.folder / LOCK, taken))
        self._locks.append(FolderLock(self.blobs.half_done, taken))


@contextmanager
def opened(folder: str | Path, url: str | None = None, *, alone: bool = True) -> Iterator[Storage]:
    """A storage, opened and closed."""
    storage = Storage(folder, url)
    try:
        storage.open(alone=alone)
        yield storage
    finally:
        storage.close()
