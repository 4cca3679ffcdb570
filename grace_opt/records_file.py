"""A file of records that grows while they are made: one JSON object a line, so that a killed run can go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from grace_opt.errors import InputError
from grace_opt.files import json_text
from grace_opt.reading import parsed
from grace_opt.records import check

Record = dict[str, Any]


class RecordsFile:
    """One JSON object of ``model`` a line, each written when it is finished. Never rewritten.

    A kill loses at most the line that was being written: such a torn last line is dropped, with a remark. One
    process at a time; the lock goes with the process, however that ends. Raises InputError for a file that cannot be
    written, is being written, or holds something else.
    """

    def __init__(self, path: Path, model: type, remark: Callable[[str], None]) -> None:
        self.path, self._model = path, model
        self.records: list[Record] = []
        try:
            self._file = path.open("a+b", buffering=0)  # nothing is left over to fail again when it is closed
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
        try:
            self._lock()
            self._read(remark)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Record) -> Record:
        """Add a record to the end of the file; it comes back."""
        line = json_text(record, default=str).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; free some space") from error
        self.records.append(record)
        return record

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing {self.path}; wait for it, or choose another folder") from None

    def _read(self, remark: Callable[[str], None]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                found = parsed(line)
                check(self._model, line)
            except InputError as error:
                raise InputError(
                    f"{self.path}, line {number}, is not a record ({error}); delete that line, or write "
                    "to another folder"
                ) from None
            self.records.append(found)
        self.loaded = len(self.records)
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
            remark(f"{self.path}: the last line was cut off and is dropped; what it said is made again")
