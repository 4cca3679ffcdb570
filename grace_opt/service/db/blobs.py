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
        self.folder, self.half_done = folder / "blobs", folder / "tmp"
        self._checked: dict[str, tuple[int, ...]] = {}  # digest -> the file of which it is the sha256

    def path(self, digest: str) -> Path:
        """Where the file with a sha256 lies."""
        return self.folder / digest[:2] / digest[2:]

    def is_sound(self, digest: str) -> bool:
        """Whether a blob is there and has the sha256 of its name. Reads it once, and again when it has changed."""
        path = self.path(digest)
        try:
            found = path.stat()
            version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if self._checked.get(digest) == version:
                return True
            with path.open("rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        if sound:
            self._checked[digest] = version
        return sound

    def temporary(self) -> Path:
        """A path for a file or folder that is being made, on the same file system."""
        return self.half_done / secrets.token_hex(16)

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
        """Make a `temporary` file the blob of its digest, whatever lay there: on disk first, then under its name."""
        target = self.path(digest)
        target.parent.mkdir(exist_ok=True)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def clear(self) -> None:
        """Remove what a server that was killed has left half done."""
        for old in self.half_done.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
