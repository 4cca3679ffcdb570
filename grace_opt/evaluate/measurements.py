"""What was measured of each trial on each prompt, once: in memory, or in a file with which a killed run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grace_opt.files import json_text

if TYPE_CHECKING:
    from grace_opt.records_file import RecordsFile

Record = dict[str, Any]


class Measurements:
    """Measurements by what they are of. With a file, those of earlier runs are found again, and new ones are added."""

    def __init__(self, file: RecordsFile | None = None) -> None:
        self._file = file
        self._found: dict[str, Record] = {each["key"]: each for each in (file.records if file is not None else ())}

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of these are known."""
        return all(key in self._found for key in keys)

    def of(self, key: str) -> Record:
        """The measurement of this key, which is known."""
        return self._found[key]

    def once(self, key: str, measure: Callable[[], Record]) -> Record:
        """The measurement of this key; ``measure`` is called only if it is not known."""
        if key not in self._found:
            self.add(key, measure())
        return self._found[key]

    def add(self, key: str, measured: Record) -> None:
        """Remember a measurement that was not known."""
        record = {"key": key, **measured}
        self._found[key] = record if self._file is None else self._file.append(record)


def key_of(*parts: Any) -> str:
    """sha256 (hex) of what a measurement is of: JSON values that say it completely."""
    return hashlib.sha256(json_text(parts, default=str).encode()).hexdigest()
