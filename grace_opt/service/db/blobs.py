"""Files by their sha256, in the data folder."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path


class BlobStore:
    """The files of a data folder: ``blobs/`` by digest, ``tmp/`` while they are being made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._half_done = folder / "blobs", folder / "tmp"

    def path(self, digest: str) -> Path:
        """Where the file with a sha256 lies."""
        return self.folder / digest[:2] / digest[2:]

    def temporary(self) -> Path:
        """A path for a file or folder that is being made, on the same file system."""
        return self._half_done / secrets.token_hex(16)

    def put(self, content: bytes) -> str:
        """Keep a file; returns its sha256. Raises OSError (a full disk)."""
        digest = hashlib.sha256(content).hexdigest()
        temporary = self.temporary()
        try:
            with temporary.open("wb") as file:
                file.write(content)
            self.adopt(temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    def adopt(self, temporary: Path, digest: str) -> None:
        """Make a `temporary` file the blob of its digest: on disk first, then under its name."""
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def clear(self) -> None:
        """Remove what a server that was killed has left half done."""
        for old in self._half_done.iterdir():
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
