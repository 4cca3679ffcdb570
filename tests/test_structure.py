"""The house: one direction, no circles, files that are read at one sitting."""

from __future__ import annotations

from tests.support.structure import circle, climbing, long_files


def test_no_import_runs_in_a_circle() -> None:
    assert circle() == []


def test_a_room_uses_only_rooms_below_it() -> None:
    assert climbing() == []


def test_long_files_say_why() -> None:
    assert long_files() == []
