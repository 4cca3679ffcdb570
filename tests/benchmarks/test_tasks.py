"""benchmarks/tasks.py: a row for each share and method, the uncompressed cache first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from grace_opt.compression.method import method
from tests.support import ROOT


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("tasks")
    sys.modules.pop("tasks", None)


def record(task: str, name: str, share: float | None, mean: float, count: int = 1) -> dict[str, Any]:
    held = {"bytes_per_token": 100 * (share or 1) - 1, "full_bytes_per_token": 100}
    of = {"task": task, "tasks": [task] * count, "score": {"mean": mean}}
    return {**of, "method": name, "budget_share": share, **held}


def test_rows_and_columns(tasks: Any) -> None:
    records = [
        record("ruler/niah_single_1", "full", None, 1.0),
        record("ruler/niah_single_1", "int4", 0.35, 0.75),
        record("longeval/lines", "full", None, 2 / 3),
        record("longeval/lines", "int4", 0.35, 0.5),
        record("ruler", "full", None, 0.9, count=2),
        record("ruler", "int4", 0.35, 0.8, count=2),
    ]
    columns = ("niah_single_1", "longeval", "ruler, mean of 2")
    assert tasks.table(records) == [
        {"share": "-", "method": "full", "bytes %": "99.0", **dict(zip(columns, ("100", "67", "90"), strict=True))},
        {"share": "0.35", "method": "int4", "bytes %": "34.0", **dict(zip(columns, ("75", "50", "80"), strict=True))},
    ]


def test_every_row_is_a_method(tasks: Any) -> None:
    assert all(method(name) for names in tasks.ROWS.values() for name in names)
