"""One run that cannot be stored, planned or sent ends alone, in a sentence; also after a restart. Outages wait."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import exc, text

from grace_opt import InputError
from grace_opt.engines import dask as engine
from grace_opt.engines.dask import Chunk, Cluster
from grace_opt.service import runner
from grace_opt.service.db.outages import is_full, is_outage
from grace_opt.solution import Limits, Status
from tests.support.faulty import FaultySolver, problems
from tests.support.setting import Setting


@pytest.fixture
def setting(tmp_path: Path, storage: str | None) -> Iterator[Setting]:
    """A service that has a bundle, on SQLite and on PostgreSQL."""
    with Setting(tmp_path, storage) as found:
        assert found.upload().status_code == 201
        yield found


def poison(setting: Setting, monkeypatch: pytest.MonkeyPatch, ratio: float, **changes: Any) -> None:
    """Records of the heads at one ratio have other values from here on."""
    real = runner.labelled

    def labelled(record: Any, instance: Any, limits: Any) -> Any:
        made = real(record, instance, limits)
        return {**made, **changes} if made["ratio"] == ratio else made

    monkeypatch.setattr(runner, "labelled", labelled)


VALUES: list[tuple[dict[str, Any], str]] = [
    ({"objective": 10**400, "timing_ns": {"total": 10**30}}, "the database does not take"),
    ({"problem": "layers.\ud800.key"}, "does not take"),
    ({"timing_ns": {"total": "a day"}, "status": ["x"]}, ""),
]


@pytest.mark.parametrize(("values", "said"), VALUES)
def test_what_a_database_refuses_fails_its_run_alone(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], said: str
) -> None:
    poison(setting, monkeypatch, 0.25, **values)
    run = setting.submit(ratios=[0.25]).json()["id"]
    other = setting.submit(ratios=[0.5]).json()["id"]
    ended = setting.wait(run)
    assert ended["state"] == "failed"
    assert said in ended["error"]
    assert ended["error"].isprintable()
    assert setting.wait(other)["state"] == "complete"
    assert setting.http.get("/healthz").status_code == 200


def test_a_number_of_300_digits_is_no_outage(
    tmp_path: Path, postgres_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.serving import new_database

    with Setting(tmp_path, new_database(postgres_server)) as setting:
        setting.upload()
        poison(setting, monkeypatch, 0.25, problem=f"layers.{'9' * 300}.kv_heads.0.key")
        assert setting.wait(setting.submit(ratios=[0.25]).json()["id"])["state"] == "failed"
        assert setting.wait(setting.submit().json()["id"])["state"] == "complete"


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), ZeroDivisionError("a mistake")])
@pytest.mark.parametrize("place", ["plan", "masks_of", "checked"])
def test_whatever_a_step_raises_fails_its_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    def broken(*_: Any) -> None:
        raise error

    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.cluster.gate.clear()  # it is poisoned while it runs, not when it is submitted
        if place == "plan":
            setting.service.runner.stop()
        run = setting.submit().json()["id"]
        monkeypatch.setattr(runner, place, broken)
        setting.cluster.gate.set()
        if place == "plan":  # as after a restart
            again = runner.Runner(setting.storage, setting.cluster)
            again.start()
        found = setting.wait(run)
        if place == "plan":
            again.stop()
        assert found["state"] == "failed"
        assert str(error) in found["error"]
        assert len(found["error"]) > 5


def test_a_request_that_cannot_be_read_stalls_nobody(tmp_path: Path) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.service.runner.stop()
        runs = [setting.submit(ratios=[ratio]).json()["id"] for ratio in (0.1, 0.2, 0.5)]
        with setting.storage.database.engine.begin() as connection:
            connection.execute(text("UPDATE runs SET request = '{half' WHERE id = 1"))
            connection.execute(text("UPDATE runs SET request = :r WHERE id = 2"), {"r": json.dumps({"old": 1})})
        again = runner.Runner(setting.storage, setting.cluster)
        again.start()
        assert setting.wait(runs[2])["state"] == "complete"
        again.stop()
        with setting.storage.database.engine.connect() as connection:
            states = connection.execute(text("SELECT state FROM runs ORDER BY id")).scalars().all()
        assert states == ["failed", "failed", "complete"]


def test_a_disk_that_is_full_for_one_run_lets_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner.masks_of

    def masks_of(records: Any, bundle: Any, request: Any, blobs: Any) -> Any:
        if request["ratios"] == [0.25] and full:
            raise InputError("cannot write kv_mask.json") from OSError(errno.ENOSPC, "No space left on device")
        return real(records, bundle, request, blobs)

    full = True
    monkeypatch.setattr(runner, "masks_of", masks_of)
    with Setting(tmp_path, None) as setting:
        setting.upload()
        waiting = setting.submit(ratios=[0.25]).json()["id"]
        assert setting.wait(setting.submit().json()["id"])["state"] == "complete"
        assert setting.http.get(f"/api/runs/{waiting}").json()["state"] == "running"
        assert f"run {waiting}: cannot write" in setting.http.get("/healthz").json()["trouble"]
        full = False
        assert setting.wait(waiting)["state"] == "complete"


class Unsendable(FaultySolver):
    """A plug-in's solver that cannot be sent to a worker."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a lock")


class NoWorkers:
    """Of Dask's client, what is needed to send nothing."""

    status = "running"

    def submit(self, *arguments: Any, **_: Any) -> Any:
        import pickle

        pickle.dumps(arguments)

    def nthreads(self) -> dict[str, int]:
        return {}


def test_a_solver_that_cannot_be_sent_is_an_error_of_its_heads() -> None:
    cluster: Any = Cluster("tcp://127.0.0.1:1")
    cluster._client = NoWorkers()
    heads = problems(3)
    cluster.add(Chunk(Unsendable(), heads, Limits(), [0, 1, 2]))
    [(chunk, results)] = cluster.landed(0.0)
    assert chunk.labels == [0, 1, 2]
    assert {raw.status for raw, _ in results} == {Status.ERROR}
    assert "cannot pickle" in results[0][0].warnings[0]
    assert cluster.landed(0.0) == []


def test_no_worker_is_said_and_where_to_start_one(tmp_path: Path) -> None:
    with Setting(tmp_path, None) as setting:
        cluster: Any = Cluster("tcp://127.0.0.1:1")
        cluster._client = NoWorkers()
        assert "no Dask worker at tcp://127.0.0.1:1; start some with grace-opt worker" in cluster.trouble()
        cluster._seen = cluster._looked = engine.time.monotonic()  # one died, and is replaced
        assert cluster.trouble() is None
        setting.cluster.trouble = lambda: "there is no Dask worker"  # type: ignore[method-assign]
        setting.service.runner.notify()
        for _ in range(100):
            answer = setting.http.get("/healthz")
            if answer.status_code == 503 and "starting" not in answer.json()["trouble"]:
                break
        assert answer.json() == {"status": "waiting", "trouble": "there is no Dask worker"}
        metrics = setting.http.get("/metrics").text
        assert "grace_opt_up 0.0" in metrics
        assert "grace_opt_workers 0.0" in metrics


def test_outages_are_told_from_what_waiting_does_not_mend() -> None:
    def of(kind: Any, **attributes: Any) -> Any:
        original = Exception("said")
        for name, value in attributes.items():
            setattr(original, name, value)
        return kind("SELECT", {}, original)

    full = InputError("cannot write")
    full.__cause__ = OSError(errno.ENOSPC, "No space left")
    outages = [
        of(exc.OperationalError),
        of(exc.InterfaceError),
        of(exc.OperationalError, sqlite_errorcode=13),
        of(exc.OperationalError, sqlstate="53100"),
        exc.TimeoutError("no connection"),
        OSError(errno.EIO, "Input/output error"),
        full,
    ]
    others = [
        of(exc.DataError),
        of(exc.IntegrityError),
        of(exc.ProgrammingError),
        of(exc.OperationalError, sqlite_errorcode=1),
        of(exc.OperationalError, sqlstate="54000"),
        OSError(errno.ENAMETOOLONG, "File name too long"),
        OSError("a plug-in's"),
        OverflowError(),
        MemoryError(),
        InputError("bad"),
    ]
    assert [is_outage(each) for each in outages + others] == [True] * len(outages) + [False] * len(others)
    assert [is_full(each) for each in outages] == [False, False, True, True, False, False, True]
