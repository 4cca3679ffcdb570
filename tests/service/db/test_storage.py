"""The storage, on SQLite and on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from grace_opt import InputError, load_bundle, solve_many
from grace_opt.compare import limits_of
from grace_opt.service.db.records import recipe
from grace_opt.service.db.runs import QueueFullError
from grace_opt.service.db.storage import Storage, opened
from grace_opt.service.db.tables import State
from grace_opt.solution import Limits, Solution
from tests.support.serving import DATA

DIGEST = "a" * 64
REQUEST = {"bundle": DIGEST, "solvers": [], "ratios": [0.5]}


@pytest.fixture
def stores(tmp_path: Path, storage: str | None) -> Iterator[Storage]:
    """An empty storage, but for a bundle."""
    with opened(tmp_path / "data", storage) as found:
        found.bundles.add(DIGEST, "heads", 3, 12, {"model": "m"})
        yield found


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Records of twelve heads."""
    problems = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.5)
    labels = {"bundle": DIGEST, "ratio": 0.5, "limits": limits_of(Limits())}
    return [{**solution.record(), **labels} for solution in solve_many(problems, "greedy")]


def submitted(stores: Storage, key: str | None = None) -> int:
    return int(stores.runs.submit(REQUEST, 12, 100, None, key)[0]["id"])


def test_a_key_submits_once_and_the_queue_is_bounded(stores: Storage) -> None:
    first, new = stores.runs.submit(REQUEST, 12, 2, "ada", "k")
    again, newer = stores.runs.submit(REQUEST, 12, 2, "ada", "k")
    assert (new, newer, again) == (True, False, first)
    submitted(stores)
    with pytest.raises(QueueFullError):
        stores.runs.submit(REQUEST, 12, 2, None, None)
    assert stores.runs.submit(REQUEST, 12, 2, "ada", "k")[0] == first  # a repetition takes no place
    assert stores.runs.counts()["queued"] == 2


def test_a_record_counts_once(stores: Storage, records: list[dict[str, Any]]) -> None:
    run = submitted(stores)
    assert stores.records.add(run, records[:5]) == 5
    assert stores.records.add(run, records[3:8]) == 8
    bodies, total = stores.records.page(run, limit=3, offset=2)
    assert (len(bodies), total) == (3, 8)


def test_pages_are_sorted_with_missing_values_last(stores: Storage, records: list[dict[str, Any]]) -> None:
    import json

    run = submitted(stores)
    gaps = [0.3, None, 0.1, 0.2, None]
    stores.records.add(run, [{**record, "gap": gap} for record, gap in zip(records, gaps, strict=False)])

    def read(**options: Any) -> list[float | None]:
        return [json.loads(body)["gap"] for body in stores.records.page(run, **options)[0]]

    assert read(sort="gap") == [0.1, 0.2, 0.3, None, None]
    assert read(sort="gap", descending=True) == [0.3, 0.2, 0.1, None, None]
    assert read(sort="gap", limit=2, offset=1) == [0.2, 0.3]
    assert stores.records.page(run, limit=1, problem=records[0]["problem"], status="feasible")[1] == 1
    assert stores.records.page(run, status="optimal") == ([], 0)


def test_what_was_solved_once_is_known(stores: Storage, records: list[dict[str, Any]]) -> None:
    first, second = submitted(stores), submitted(stores)
    stores.records.add(first, records)
    longer = {**records[0]["limits"], "time_limit": 9.0}
    failure = {**records[1], "status": "error", "objective": None}
    stores.records.add(second, [{**records[0], "limits": longer}, failure, records[2]])
    known = stores.records.known([record["digest"] for record in records[:3]], "greedy")
    assert sorted(recipe(record) for record in known if record["digest"] == records[0]["digest"]) == sorted(
        [recipe(records[0]), recipe({**records[0], "limits": longer})]
    )
    assert len(known) == 4  # the error is not among them, the repetition is there once
    assert stores.records.known([records[0]["digest"]], "sdp") == []


def test_a_run_is_finished_or_cancelled_but_not_both(stores: Storage, records: list[dict[str, Any]]) -> None:
    one, other = submitted(stores), submitted(stores)
    mask = {"ratio": 0.5, "solver": "greedy", "digest": DIGEST, "tensors": DIGEST, "objective_sum": 1.0}
    stores.records.add(one, records)
    assert stores.runs.move(one, State.RUNNING)
    assert stores.runs.finish(one, [{**r, "over_best": 0.0} for r in records], [mask], [{"solver": "greedy"}])
    assert not stores.runs.move(one, State.CANCELLED)
    assert stores.runs.move(other, State.CANCELLED)
    assert not stores.runs.finish(other, records, [], [])
    assert [stores.runs.find(run)["state"] for run in (one, other)] == ["complete", "cancelled"]  # type: ignore[index]
    assert stores.records.page(one, sort="over_best")[1] == 12
    assert [found["solver"] for found in stores.masks.of(one)] == ["greedy"]
    assert stores.runs.unfinished() == []
    stores.runs.delete(one)
    assert (stores.runs.find(one), stores.records.page(one), stores.masks.of(one)) == (None, ([], 0), [])
    assert submitted(stores) > other  # a number is never used again


def test_one_server_at_a_time(stores: Storage, tmp_path: Path, storage: str | None) -> None:
    program = """
import sys
from grace_opt.service.db.storage import opened
with opened(sys.argv[1], sys.argv[2] or None): pass
"""
    command = [sys.executable, "-c", program, str(tmp_path / "data"), storage or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: another server works on" in done.stderr
    stores.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_a_kill_left_half_done_is_cleared(stores: Storage, tmp_path: Path, storage: str | None) -> None:
    half = stores.folder / "tmp" / "mask"
    half.mkdir()
    (half / "kv_mask.json").write_text("{")
    (stores.folder / "tmp" / "upload").write_text("half")
    with opened(tmp_path / "data", storage, alone=False):  # a command beside the server touches nothing
        assert half.is_dir()
    stores.close()
    with opened(tmp_path / "data", storage) as again:
        assert list((again.folder / "tmp").iterdir()) == []


def test_a_newer_database_is_refused(stores: Storage, tmp_path: Path, storage: str | None) -> None:
    with stores.database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    stores.close()
    with pytest.raises(InputError, match="was made by a newer grace-opt"):
        Storage(tmp_path / "data", storage).open()


@pytest.mark.parametrize("url", ["sqlite://", "no url", "mysql://x/y", "oracle://x", "postgresql://127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_used(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="storage"):
        Storage(tmp_path, url).open()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use the data folder .* choose another one"):
        Storage(tmp_path / "file")


def test_a_record_is_a_solution_again(records: list[dict[str, Any]]) -> None:
    for record in records:
        again = Solution.from_record(record).record()
        assert again == {name: record[name] for name in again}
