"""Locks on things, not on names: links, other mounts and relative paths lead to the same lock."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from grace_opt.errors import InputError

FAR = 1 << 62  #: a byte that SQLite never locks: its own are at 2**30


class FileLock:
    """A lock on a file itself, which goes with the process, however that ends.

    It is one byte, far behind the file's end, of an open file description (Linux, macOS): unlike other locks of POSIX,
    it does not go when something else in this process closes the file, and unlike `flock` it never meets the locks
    that SQLite takes.

    Args:
        path: of the file; made, with its folder, if need be.
        taken: raised if another process has the lock.

    Raises:
        InputError: if the file cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path, taken: InputError) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less what the umask says
        except OSError as error:
            raise InputError(f"cannot use {path}: {error.strerror}; choose another place") from error
        try:
            self._take()
        except OSError as error:
            os.close(self._file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise taken from None
            raise InputError(
                f"cannot lock {path}: {error.strerror}; choose a folder on a local disk, which has locks"
            ) from None

    def is_in_place(self) -> bool:
        """Whether the file is still what lies under its name."""
        held = os.fstat(self._file)
        try:
            found = self.path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def close(self) -> None:
        """Let go."""
        os.close(self._file)

    def _take(self) -> None:
        if hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("l") == 8:
            byte = struct.pack("hhlli4x", fcntl.F_WRLCK, os.SEEK_SET, FAR, 1, 0)
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, byte)
        else:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, FAR)


class FolderLock:
    """A lock on a folder itself; where its file system has none for folders (NFS), there is none.

    Args:
        path: of the folder.
        taken: raised if another process has the lock.
    """

    def __init__(self, path: Path, taken: InputError) -> None:
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._folder)
            raise taken from None
        except OSError:
            pass

    def close(self) -> None:
        """Let go."""
        os.close(self._folder)
