"""The migrations make the tables, and lose nothing of an older database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData

from grace_opt.service.db import migrations
from grace_opt.service.db.storage import Storage, opened
from grace_opt.service.db.tables import Table
from grace_opt.service.plan import method_of, windows_of
from grace_opt.service.schemas import RunLimits, RunRequest

BUNDLE, TIME = "a" * 64, "2026-01-31T12:00:00+00:00"
REQUEST: dict[str, Any] = {
    "bundle": BUNDLE,
    "solvers": [{"solver": "greedy", "options": {}}],
    "ratios": [0.5, 0.0],
    "limits": {"time_limit": None, "seed": 0, "threads": 1},
    "config": {"protect": False, "readout": "none", "recent_window": None, "sinks": 7},
    "name": "old",
}


def upgrade_to(connection: Connection, version: str) -> None:
    """Run the migrations as far as a version."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, version)


def fill(connection: Connection) -> None:
    """A complete run at two ratios, as the first version wrote it."""
    found = MetaData()
    found.reflect(connection)

    def insert(table: str, *rows: dict[str, Any]) -> None:
        connection.execute(found.tables[table].insert(), list(rows))

    bundle = {"digest": BUNDLE, "name": "b", "nbytes": 3, "heads": 2, "about": {"model": "m"}, "created": TIME}
    run = {"bundle": BUNDLE, "state": "complete", "request": REQUEST, "total": 4, "done": 4, "reused": 0}
    insert("bundles", bundle)
    insert("runs", {"id": 7, **run, "created": TIME, "summary": []})
    labels = {"run": 7, "solver": "greedy", "digest": "d", "recipe": "r", "status": "feasible", "limit": "none"}
    records = [
        {**labels, "ratio": ratio, "problem": problem, "time_ns": 1, "body": json.dumps({"problem": problem})}
        for ratio in (0.5, 0.0)
        for problem in ("layers.0.kv_heads.0.key", "layers.0.kv_heads.1.key")
    ]
    insert("records", *records)
    mask = {"run": 7, "solver": "greedy", "digest": "d", "tensors": "t", "objective_sum": 1.5}
    insert("masks", {**mask, "ratio": 0.5}, {**mask, "ratio": 0.0})


def test_they_make_the_tables(tmp_path: Path, storage: str | None) -> None:
    with opened(tmp_path / "data", storage) as found, found.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_what_the_first_version_wrote_is_still_there(tmp_path: Path, storage: str | None) -> None:
    old = Storage(tmp_path / "data", storage)
    with old.database.engine.begin() as connection:
        upgrade_to(connection, "0001")
        fill(connection)
    old.close()
    with opened(tmp_path / "data", storage) as found:
        assert [json.loads(body)["problem"][-5] for body in found.records.page(7)[0]] == ["0", "1", "0", "1"]
        assert found.records.page(7, budget="0")[1] == found.records.page(7, ratio=0.5, budget="0.5")[1] == 2
        assert [(mask["budget"], mask["ratio"], mask["value_ratio"]) for mask in found.masks.of(7)] == [
            ("0", 0.0, None),
            ("0.5", 0.5, None),
        ]
        request = found.runs.find(7)["request"]  # type: ignore[index]
        assert {name: request[name] for name in REQUEST} == REQUEST
        assert RunRequest.model_validate(request).model_dump() == {
            **request,
            "limits": RunLimits(**REQUEST["limits"]).model_dump(),
        }
        method = method_of(request)  # as it was before there were methods
        assert (method.sharing.budget, method.sharing.rounding, method.sharing.align) == ("uniform", "floor", 1)
        assert (method.selection.protection, method.windows.generated) == (None, "prune")
        assert windows_of(request) == {"sinks": 7}
        protected = {**request, "config": {**REQUEST["config"], "protect": True}}
        assert method_of(protected).selection.protection is not None
        found.runs.delete(7)
        assert found.records.page(7)[1] == len(found.masks.of(7)) == 0
