"""The store, on SQLite and on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from grace_opt import InputError, load_bundle, solve_many
from grace_opt.compare.compare import limits_of
from grace_opt.service.db.store import QueueFullError, Store, opened, recipe
from grace_opt.service.db.tables import State
from grace_opt.solution import Limits, Solution
from tests.support.serving import DATA

DIGEST = "a" * 64
REQUEST = {"bundle": DIGEST, "solvers": [], "ratios": [0.5]}


@pytest.fixture
def store(tmp_path: Path, storage: str | None) -> Iterator[Store]:
    """An empty store."""
    with opened(tmp_path / "data", storage) as found:
        found.add_bundle(DIGEST, "heads", 3, 12, {"model": "m"})
        yield found


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Records of twelve heads."""
    problems = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.5)
    labels = {"bundle": DIGEST, "ratio": 0.5, "limits": limits_of(Limits())}
    return [{**solution.record(), **labels} for solution in solve_many(problems, "greedy")]


def submitted(store: Store, key: str | None = None) -> int:
    return int(store.submit(REQUEST, 12, 100, None, key)[0]["id"])


def test_a_key_submits_once_and_the_queue_is_bounded(store: Store) -> None:
    first, new = store.submit(REQUEST, 12, 2, "ada", "k")
    again, newer = store.submit(REQUEST, 12, 2, "ada", "k")
    assert (new, newer, again) == (True, False, first)
    submitted(store)
    with pytest.raises(QueueFullError):
        store.submit(REQUEST, 12, 2, None, None)
    assert store.submit(REQUEST, 12, 2, "ada", "k")[0] == first  # a repetition takes no place
    assert store.counts()["queued"] == 2


def test_a_record_counts_once(store: Store, records: list[dict[str, Any]]) -> None:
    run = submitted(store)
    assert store.add_records(run, records[:5]) == 5
    assert store.add_records(run, records[3:8]) == 8
    bodies, total = store.records(run, limit=3, offset=2)
    assert (len(bodies), total) == (3, 8)


def test_pages_are_sorted_with_missing_values_last(store: Store, records: list[dict[str, Any]]) -> None:
    import json

    run = submitted(store)
    gaps = [0.3, None, 0.1, 0.2, None]
    store.add_records(run, [{**record, "gap": gap} for record, gap in zip(records, gaps, strict=False)])

    def read(**options: Any) -> list[float | None]:
        return [json.loads(body)["gap"] for body in store.records(run, **options)[0]]

    assert read(sort="gap") == [0.1, 0.2, 0.3, None, None]
    assert read(sort="gap", descending=True) == [0.3, 0.2, 0.1, None, None]
    assert read(sort="gap", limit=2, offset=1) == [0.2, 0.3]
    assert store.records(run, limit=1, problem=records[0]["problem"], status="feasible")[1] == 1
    assert store.records(run, status="optimal") == ([], 0)


def test_what_was_solved_once_is_known(store: Store, records: list[dict[str, Any]]) -> None:
    first, second = submitted(store), submitted(store)
    store.add_records(first, records)
    longer = {**records[0]["limits"], "time_limit": 9.0}
    failure = {**records[1], "status": "error", "objective": None}
    store.add_records(second, [{**records[0], "limits": longer}, failure, records[2]])
    known = store.known([record["digest"] for record in records[:3]], "greedy")
    assert sorted(recipe(record) for record in known if record["digest"] == records[0]["digest"]) == sorted(
        [recipe(records[0]), recipe({**records[0], "limits": longer})]
    )
    assert len(known) == 4  # the error is not among them, the repetition is there once
    assert store.known([records[0]["digest"]], "sdp") == []


def test_a_run_is_finished_or_cancelled_but_not_both(store: Store, records: list[dict[str, Any]]) -> None:
    one, other = submitted(store), submitted(store)
    mask = {"ratio": 0.5, "solver": "greedy", "digest": DIGEST, "tensors": DIGEST, "objective_sum": 1.0}
    store.add_records(one, records)
    assert store.move(one, State.RUNNING)
    assert store.finish(one, [{**r, "over_best": 0.0} for r in records], [mask], [{"solver": "greedy"}])
    assert not store.move(one, State.CANCELLED)
    assert store.move(other, State.CANCELLED)
    assert not store.finish(other, records, [], [])
    assert [store.run(run)["state"] for run in (one, other)] == ["complete", "cancelled"]  # type: ignore[index]
    assert store.records(one, sort="over_best")[1] == 12
    assert [found["solver"] for found in store.masks(one)] == ["greedy"]
    assert store.unfinished() == []
    store.delete(one)
    assert (store.run(one), store.records(one), store.masks(one)) == (None, ([], 0), [])
    assert submitted(store) > other  # a number is never used again


def test_one_server_at_a_time(store: Store, tmp_path: Path, storage: str | None) -> None:
    program = (
        "import sys; from grace_opt.service.db.store import opened\nwith opened(sys.argv[1], sys.argv[2] or None): pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "data"), storage or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: another server works on" in done.stderr
    store.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_a_kill_left_half_done_is_cleared(store: Store, tmp_path: Path, storage: str | None) -> None:
    half = store.folder / "tmp" / "mask"
    half.mkdir()
    (half / "kv_mask.json").write_text("{")
    (store.folder / "tmp" / "upload").write_text("half")
    with opened(tmp_path / "data", storage, alone=False):  # a command beside the server touches nothing
        assert half.is_dir()
    store.close()
    with opened(tmp_path / "data", storage) as again:
        assert list((again.folder / "tmp").iterdir()) == []


def test_a_newer_database_is_refused(store: Store, tmp_path: Path, storage: str | None) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(InputError, match="was made by a newer grace-opt"):
        Store(tmp_path / "data", storage).open()


@pytest.mark.parametrize("url", ["sqlite://", "no url", "mysql://x/y", "oracle://x", "postgresql://127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_used(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="storage"):
        Store(tmp_path, url).open()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use the data folder .* choose another one"):
        Store(tmp_path / "file")


def test_a_record_is_a_solution_again(records: list[dict[str, Any]]) -> None:
    for record in records:
        again = Solution.from_record(record).record()
        assert again == {name: record[name] for name in again}
