"""What waits, waits as long as it is asked to and says so; what says that nothing changed, changes nothing."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from grace_opt import InputError
from grace_opt.cli.app import run as command
from grace_opt.service import client as module
from grace_opt.service.client import Client, ServiceError
from tests.support.setting import HEADS, Setting


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes at once; the seconds that were slept."""
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(module, "time", type("Time", (), {"sleep": sleep, "monotonic": lambda: clock[0]}))
    return slept


RUN = {
    "id": 1,
    "bundle": "0" * 64,
    "error": None,
    "request": {"bundle": "0" * 64, "solvers": [{"solver": "greedy"}], "ratios": [0.5]},
    "total": 12,
    "done": 3,
    "reused": 0,
    "submitted_by": None,
    "created": "",
    "started": None,
    "ended": None,
    "summary": [],
}


def answering(client: Client, answers: Callable[[int], Any]) -> Client:
    """Let a client be answered by a function of the number of its request."""
    count = [0]

    def handler(request: httpx.Request) -> httpx.Response:
        count[0] += 1
        answer = answers(count[0])
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(handler))
    return client


AWAY: list[Any] = [
    httpx.Response(503, json={"detail": "the database cannot be reached"}, headers={"Retry-After": "5"}),
    httpx.Response(502, text="<html>nginx</html>"),
    httpx.Response(503, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("slow"),
]


@pytest.mark.parametrize("away", AWAY, ids=str)
def test_a_wait_bears_an_outage_of_any_length(no_pauses: list[float], away: Any) -> None:
    said: list[str] = []
    with Client("http://127.0.0.1:1", waiting=said.append) as client:
        running, complete = {**RUN, "state": "running"}, {**RUN, "state": "complete"}
        answering(client, lambda n: running if n == 1 else (away if n < 500 else complete))
        assert client.wait(1).state == "complete"
    assert sum(no_pauses) > 450
    assert max(no_pauses) <= 5.0
    assert len(said) == 1
    assert said[0].startswith("waiting for http://127.0.0.1:1: ")


def test_a_wait_ends_at_its_timeout_whatever_the_service_does(no_pauses: list[float]) -> None:
    with Client("http://127.0.0.1:1") as client:
        answering(client, lambda n: {**RUN, "state": "running"})
        with pytest.raises(InputError, match=r"has not ended in 30 s: it is running, 3 of 12; it goes on"):
            client.wait(1, timeout=30)
        assert sum(no_pauses) == pytest.approx(30)
        answering(client, lambda n: AWAY[0])
        with pytest.raises(ServiceError, match="database cannot be reached"):
            client.wait(1, timeout=30)
        assert sum(no_pauses) == pytest.approx(60)


def test_what_no_patience_mends_is_said_at_once(no_pauses: list[float]) -> None:
    for answer, said in (
        (httpx.Response(404, json={"detail": "there is no run 1"}), "there is no run 1"),
        (httpx.Response(401, json={"detail": "an API key is needed"}), "API key"),
        (httpx.Response(301, headers={"Location": "https://solver.example/"}), "sends to https://solver.example/"),
        (httpx.ConnectError("refused"), "no grace-opt service answers"),  # one that has never answered
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "SSL_CERT_FILE"),
    ):
        with Client("https://127.0.0.1:1", patience=math.inf) as client:
            answering(client, lambda n, answer=answer: answer)  # type: ignore[misc]
            with pytest.raises(InputError, match=said):
                client.run(1)
    assert no_pauses == []


def full(*_: Any) -> None:
    original = sqlite3.OperationalError("database or disk is full")
    original.sqlite_errorcode = sqlite3.SQLITE_FULL  # type: ignore[misc]
    raise OperationalError("DELETE", {}, original)


@pytest.mark.parametrize(("verb", "path", "broken"), [("DELETE", "", "delete"), ("POST", "/cancel", "move")])
def test_a_full_disk_changes_nothing_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, path: str, broken: str
) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.cluster.gate.clear()
        run = setting.submit().json()["id"]
        monkeypatch.setattr(setting.storage.runs, broken, full)
        answer = setting.http.request(verb, f"/api/runs/{run}{path}")
        assert (answer.status_code, "nothing was changed" in answer.json()["detail"]) == (507, True)
        assert setting.http.get(f"/api/runs/{run}").json()["state"] in ("queued", "running")
        monkeypatch.undo()
        setting.cluster.gate.set()
        assert setting.wait(run)["state"] == "complete"
        assert setting.http.delete(f"/api/runs/{run}").status_code == 204
        assert setting.http.get(f"/api/runs/{run}").status_code == 404


def test_a_run_that_is_deleted_while_it_is_worked_on_is_dropped(tmp_path: Path) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.cluster.gate.clear()
        run = setting.submit(ratios=[0.25]).json()["id"]
        assert setting.http.delete(f"/api/runs/{run}").status_code == 204
        setting.cluster.gate.set()
        assert setting.wait(setting.submit().json()["id"])["state"] == "complete"
        assert setting.storage.records.page(run) == ([], 0)


def test_one_shape_of_json_in_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.cluster.gate.clear()
        states = {}
        for ratio, after in ((0.25, "cancel"), (0.5, None)):
            run = setting.submit(ratios=[ratio], name="\x1b[31mred[/x]").json()["id"]
            if after:
                setting.http.post(f"/api/runs/{run}/cancel")
            assert command(["status", str(run), "--url", setting.url, "-f", "json"]) == 0
            states[run] = json.loads(capsys.readouterr().out)
        assert command(["status", "--url", setting.url]) == 0
        listed = capsys.readouterr().out
        assert "\x1b" not in listed
        assert r"\x1b[31mred[/x]" in listed.replace("\n", "")
        setting.cluster.gate.set()
        setting.wait(2)
        assert command(["status", "2", "--url", setting.url, "-f", "json", "--wait", "--timeout", "60"]) == 0
        states["complete"] = json.loads(capsys.readouterr().out)
        assert command(["status", "1", "--url", setting.url, "-f", "json", "--wait"]) == 2
        printed = capsys.readouterr()
        assert "run 1 is cancelled" in printed.err
        states["again"] = json.loads(printed.out)
    assert {frozenset(each) for each in states.values()} == {frozenset({"run", "records"})}
    assert len({frozenset(each["run"]) for each in states.values()}) == 1
    assert [each["run"]["state"] for each in states.values()][2:] == ["complete", "cancelled"]
    assert [len(each["records"]) for each in states.values()][2:] == [12, 0]


def test_the_config_file_names_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        setting.wait(setting.submit().json()["id"])
        (tmp_path / "c.toml").write_text(f'[service]\nurl = "{setting.url}"\ndata = "{tmp_path / "keys"}"\n')
        config = ["--config", str(tmp_path / "c.toml")]
        assert command(["status", *config]) == command(["status", "1", *config]) == 0
        assert command(["fetch", "1", "-o", str(tmp_path / "mask"), *config]) == 0
        assert command(["keys", "add", "ada", *config]) == command(["keys", "list", *config]) == 0
        assert (tmp_path / "keys").is_dir()
        assert "ada" in capsys.readouterr().out


def test_a_timeout_goes_with_a_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["status", "1", "--timeout", "3"]) == 2
    submit = ["submit", str(HEADS), "--solver", "greedy", "--ratio", "0.5"]
    assert command([*submit, "--timeout", "3"]) == 2
    assert capsys.readouterr().err.count("--timeout says how long to --wait") == 2
