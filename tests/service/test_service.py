"""The HTTP API: what it answers, what it refuses and how, and what outlives trouble."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from grace_opt import InputError, load_mask
from grace_opt.compression.budget import Budget
from grace_opt.compression.from_bundle import problems_of
from grace_opt.compression.method import method
from grace_opt.graphs import load_bundle, save_bundle
from grace_opt.service.client import Client
from grace_opt.service.http.access import Rates, new_key
from grace_opt.service.http.app import create_app
from grace_opt.service.http.state import Service
from tests.support.patience import until
from tests.support.serving import Postgres, new_database, pg_ctl, skip_without_postgres
from tests.support.setting import CONTENT, DIGEST, HEADS, Setting


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    """A service that has a bundle."""
    with Setting(tmp_path, None) as found:
        assert found.upload(name="heads").status_code == 201
        yield found


def problem_of(answer: Any, status: int) -> str:
    """The sentence of a problem, whose body has everything that it must have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    return str(body["detail"])


# ---------------------------------------------------------------- bundles


def test_a_bundle_is_stored_once_under_its_digest(setting: Setting) -> None:
    again = setting.upload(digest=DIGEST)
    assert again.json()["digest"] == DIGEST
    assert again.json()["heads"] == 12
    listed = setting.http.get("/api/bundles").json()
    assert (listed["total"], listed["bundles"][0]["name"]) == (1, "heads")
    assert setting.storage.blobs.path(DIGEST).read_bytes() == CONTENT
    assert list((setting.storage.folder / "tmp").iterdir()) == []


def test_a_bundle_in_the_data_folder_is_registered(setting: Setting, tmp_path: Path) -> None:
    folder = setting.storage.folder / "bundles"
    other = load_bundle(HEADS)
    save_bundle(type(other)(other.heads[:3], other.metadata), folder / "deep" / "three.safetensors")
    answer = setting.http.post("/api/bundles/register", json={"path": "deep/three.safetensors"})
    assert (answer.status_code, answer.json()["heads"]) == (201, 3)
    (folder / "link").symlink_to("/etc")
    for path in ("../grace-opt.db", "/etc/passwd", "link/passwd", "none", "a" * 999, "deep"):
        said = problem_of(setting.http.post("/api/bundles/register", json={"path": path}), 404)
        assert "no file" in said


def header(length: int, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + rest


def damaged() -> list[tuple[bytes, str]]:
    nan = load_bundle(HEADS)
    weights = nan.heads[0].weights.copy()
    weights[3, 3] = np.nan
    return [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (header(2**62), "header has"),
        (header(1 << 30, b"x" * 100), "header has"),
        (header(2, b"{}"), "not a graph bundle"),
        (b"\x80\x04\x95" + b"pickle" * 10, "header has"),
        (CONTENT[:-5], "truncated"),
    ]


@pytest.mark.parametrize(("content", "said"), damaged())
def test_a_damaged_bundle_is_refused(setting: Setting, content: bytes, said: str) -> None:
    sentence = problem_of(setting.upload(content), 422)
    assert said in sentence
    assert str(setting.storage.folder) not in sentence
    assert setting.http.get("/api/bundles").json()["total"] == 1
    assert list((setting.storage.folder / "tmp").iterdir()) == []


def test_nan_another_digest_and_too_much_are_refused(setting: Setting, tmp_path: Path) -> None:
    bundle = load_bundle(HEADS)
    bundle.heads[0].weights.setflags(write=True)
    bundle.heads[0].weights[3, 3] = np.nan
    save_bundle(bundle, tmp_path / "nan.safetensors")
    assert "finite" in problem_of(setting.upload((tmp_path / "nan.safetensors").read_bytes()), 422)
    assert "sha256" in problem_of(setting.upload(CONTENT, digest="0" * 64), 422)
    setting.service.upload_limit = 1000
    assert "--upload-limit" in problem_of(setting.upload(), 413)
    assert "may have 1048576 bytes" in problem_of(setting.http.post("/api/runs", content=b"x" * (1 << 21)), 413)

    def blocks() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * (1 << 19)

    problem_of(setting.http.post("/api/runs", content=blocks()), 413)


# ---------------------------------------------------------------- runs


def test_a_run_from_submission_to_mask(setting: Setting, tmp_path: Path) -> None:
    solvers = [{"solver": "greedy", "options": {"direction": "backward"}}, {"solver": "branch-and-bound"}]
    accepted = setting.submit(solvers=solvers, ratios=[0.5, 0.6, 0.5], name="two")
    assert accepted.status_code == 202
    assert accepted.headers["location"] == "/api/runs/1"
    assert accepted.json()["total"] == 12 * 2 * 2
    run = setting.wait(1)
    assert (run["state"], run["done"], run["reused"]) == ("complete", 48, 0)
    assert [(row["ratio"], row["solver"], row["optimal_share"]) for row in run["summary"]] == [
        (0.5, "greedy", 0.0),
        (0.5, "branch-and-bound", 1.0),
        (0.6, "greedy", 0.0),
        (0.6, "branch-and-bound", 1.0),
    ]
    page = setting.http.get("/api/runs/1/records?sort=over_best&descending=true&limit=5").json()
    assert page["total"] == 48
    worst = page["records"][0]
    assert worst["solver"] == "greedy"
    assert worst["options"]["direction"] == "backward"
    assert worst["over_best"] == max(record["over_best"] for record in page["records"])
    assert worst["best_bound_solver"] == "branch-and-bound"
    few = setting.http.get(
        "/api/runs/1/records?solver=greedy&ratio=0.6&status=feasible&problem=layers.8.kv_heads.1.key"
    )
    assert few.json()["total"] == 1
    masks = setting.http.get("/api/runs/1/masks").json()
    assert [(mask["ratio"], mask["solver"]) for mask in masks] == [
        (0.5, "branch-and-bound"),
        (0.5, "greedy"),
        (0.6, "branch-and-bound"),
        (0.6, "greedy"),
    ]
    for ending, digest in (("json", masks[0]["digest"]), ("safetensors", masks[0]["tensors"])):
        got = setting.http.get(f"/api/masks/{masks[0]['digest']}.{ending}")
        assert hashlib.sha256(got.content).hexdigest() == digest
        assert "immutable" in got.headers["cache-control"]
        again = setting.http.get(
            f"/api/masks/{masks[0]['digest']}.{ending}", headers={"If-None-Match": got.headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
    with Client(setting.url) as client:
        client.fetch(client.masks(1)[0], tmp_path / "mask")
    mask = load_mask(tmp_path / "mask")
    assert mask.solver["name"] == "branch-and-bound"
    best = setting.http.get("/api/runs/1/records?solver=branch-and-bound&ratio=0.5&limit=1").json()["records"][0]
    assert set(mask.key_keep[0][0].tolist()) == set(range(64)) - set(best["pruned"])


def test_a_run_takes_the_default_method_unless_told_otherwise(setting: Setting, tmp_path: Path) -> None:
    assert setting.submit(method_options={}).json()["request"]["method"] == "grace-opt"
    assert setting.wait(1)["state"] == "complete"
    records = setting.http.get("/api/runs/1/records").json()["records"]
    prunes = [record["prune"] for record in records]
    assert len(set(prunes)) > 1  # the heads share the budget
    assert sum(prunes) == 12 * 32
    expected = problems_of(load_bundle(HEADS), method("grace-opt"), Budget(0.5, 0.5))
    assert [(record["problem"], record["prune"]) for record in records] == [(p.name, p.prune) for p in expected]
    config = {"readout": "none", "sinks": 7}
    think = setting.submit(method="think", method_options={"align": 8, "recent_window": 9}, ratios=[0.6], config=config)
    assert setting.wait(think.json()["id"])["state"] == "complete"
    assert {r["prune"] for r in setting.http.get("/api/runs/2/records").json()["records"]} == {32}
    with Client(setting.url) as client:
        for run, folder in ((1, "shared"), (2, "think")):
            client.fetch(client.masks(run)[0], tmp_path / folder)
    shared, think_mask = load_mask(tmp_path / "shared"), load_mask(tmp_path / "think")
    assert shared.solver["method"] == method("grace-opt").options()
    assert think_mask.align == 8
    assert {(layer.windows.sinks, layer.windows.recent_window) for layer in think_mask.plan} == {(7, 9)}
    assert {layer.windows.sinks for layer in shared.plan} == {int(load_bundle(HEADS).metadata.get("sinks", 4))}


def test_budgets_of_values_and_in_bytes(setting: Setting) -> None:
    bundle = load_bundle(HEADS)
    values = [type(head)(head.layer, head.kv_head, "value", head.weights) for head in bundle.heads]
    path = setting.storage.folder / "bundles" / "values.safetensors"
    save_bundle(type(bundle)((*bundle.heads, *values), bundle.metadata), path)
    digest = setting.http.post("/api/bundles/register", json={"path": path.name}).json()["digest"]
    ratios = setting.wait(setting.submit(bundle=digest, ratios=[0.5, 0.25], value_ratio=0.25).json()["id"])
    layers = len({head.layer for head in bundle.heads})
    whole = layers * 3 * 2 * 64 * 2  # bytes of a token's keys and values at 16 bits
    asked: dict[str, Any] = {"ratios": [], "budget_bytes": [whole / 2, 1000.0 * whole], "method_options": {}}
    sizes = setting.wait(setting.submit(bundle=digest, **asked).json()["id"])
    assert [
        (row["ratio"], row["value_ratio"], row["budget_bytes"]) for row in ratios["summary"] + sizes["summary"]
    ] == [
        (0.5, 0.25, None),
        (0.25, 0.25, None),
        (None, None, whole / 2),
        (None, None, 1000.0 * whole),
    ]
    for query, prunes in (
        ("ratio=0.5", {"key": 32, "value": 16}),
        ("ratio=0.25&value_ratio=0.25", {"key": 16, "value": 16}),
    ):
        records = setting.http.get(f"/api/runs/1/records?{query}&limit=100").json()["records"]
        assert len(records) == 24
        assert all(record["prune"] == prunes[record["problem"].rpartition(".")[2]] for record in records)
    records = setting.http.get(f"/api/runs/2/records?budget_bytes={whole / 2}&limit=100").json()["records"]
    assert sum(2 * (record["n"] - record["prune"]) for record in records) <= whole / 2
    assert {record["prune"] for record in setting.storage.records.all(2, budget=f"{1000 * whole}B")} == {0}
    masks = [setting.http.get(f"/api/runs/{run}/masks").json() for run in (1, 2)]
    assert [(mask["ratio"], mask["value_ratio"], mask["budget_bytes"]) for of in masks for mask in of] == [
        (0.25, 0.25, None),
        (0.5, 0.25, None),
        (None, None, whole / 2),
        (None, None, 1000.0 * whole),
    ]
    again = setting.wait(setting.submit(bundle=digest, ratios=[0.25]).json()["id"])  # values as keys: the same problems
    assert again["reused"] == 24
    found = setting.http.get("/api/compare?run=1&run=2").json()
    assert (found["differences"], len(found["summary"])) == ([], 4)
    for path_of in (
        "/runs/2",
        f"/runs/2/heads/{records[0]['problem']}?budget_bytes={whole / 2}",
        "/compare?run=1&run=2",
    ):
        page = setting.http.get(path_of, headers={"Accept": "text/html"})
        assert page.status_code == 200
        assert f"{whole // 2} bytes" in page.text
    drawn = setting.http.get(f"/runs/2/heads/{records[0]['problem']}/report.json?budget_bytes={whole / 2}").json()
    assert drawn["sets"][0]["sizes"] == [[64, records[0]["prune"]]]
    assert [each["budget"] for each in setting.http.get("/runs/1/report.json").json()["sets"]] == [
        "ratios 0.5 and 0.25",
        "ratios 0.25 and 0.25",
    ]
    left, right = "1:0.5,0.25:greedy", f"2:{whole // 2}B:greedy"
    channels = setting.http.get("/compare/channels.json", params={"left": left, "right": right}).json()
    assert len(channels["heads"]) == 24


def test_what_was_solved_once_is_served_from_the_store(setting: Setting) -> None:
    setting.wait(setting.submit().json()["id"])
    setting.cluster.gate.clear()  # nothing is solved from here on
    again = setting.wait(setting.submit().json()["id"])
    assert (again["state"], again["reused"]) == ("complete", 12)
    first, second = (setting.http.get(f"/api/runs/{run}/records").json()["records"] for run in (1, 2))
    assert first == second
    longer = setting.submit(limits={"time_limit": 60}).json()["id"]  # greedy had ended by itself: that stands
    assert setting.wait(longer)["reused"] == 12
    other = setting.submit(solvers=[{"solver": "greedy", "options": {"direction": "backward"}}]).json()["id"]
    until(lambda: setting.cluster.chunks, "its heads are sent")
    assert setting.found(other)["done"] == 0
    setting.cluster.gate.set()
    assert setting.wait(other)["reused"] == 0


def test_the_same_idempotency_key_gives_the_same_run(setting: Setting) -> None:
    first = setting.submit({"Idempotency-Key": "k"})
    again = setting.submit({"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    assert "another request" in problem_of(setting.submit({"Idempotency-Key": "k"}, ratios=[0.6]), 409)
    assert setting.submit({"Idempotency-Key": "l"}).json()["id"] != first.json()["id"]


def test_cancel_keeps_what_is_there(setting: Setting) -> None:
    setting.cluster.gate.clear()
    run = setting.submit().json()["id"]
    until(lambda: setting.cluster.chunks, "its heads are sent")
    assert setting.http.post(f"/api/runs/{run}/cancel").json()["state"] == "cancelled"
    setting.cluster.gate.set()
    assert setting.wait(setting.submit(ratios=[0.3]).json()["id"])["state"] == "complete"
    assert setting.found(run)["done"] == 0  # and the runner has come by since
    assert setting.http.post("/api/runs/2/cancel").json()["state"] == "complete"
    assert setting.http.delete(f"/api/runs/{run}").status_code == 204
    assert problem_of(setting.http.get(f"/api/runs/{run}"), 404) == f"there is no run {run}"
    assert [each["id"] for each in setting.http.get("/api/runs?state=complete").json()["runs"]] == [2]


def test_progress_is_streamed(setting: Setting) -> None:
    setting.cluster.gate.clear()
    run = setting.submit(solvers=[{"solver": "branch-and-bound"}]).json()["id"]
    events: list[Any] = []
    with setting.http.stream("GET", f"/api/runs/{run}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line[5:]))
                setting.cluster.gate.set()  # after the first one
    assert events[0]["done"] == 0
    assert events[-1] == {"state": "complete", "done": 12, "total": 12}
    assert [event["done"] for event in events] == sorted(event["done"] for event in events)
    problem_of(setting.http.get("/api/runs/99/events"), 404)


def test_records_of_a_complete_run_have_an_etag(setting: Setting) -> None:
    setting.wait(setting.submit().json()["id"])
    first = setting.http.get("/api/runs/1/records?limit=3")
    again = setting.http.get("/api/runs/1/records?limit=3", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, again.status_code) == (200, 304)
    assert setting.http.get("/api/runs/1/records?limit=3").content == first.content


def test_runs_are_compared(setting: Setting) -> None:
    for solver in ("greedy", "branch-and-bound"):
        setting.wait(setting.submit(solvers=[{"solver": solver}, {"solver": "independent"}]).json()["id"])
    found = setting.http.get("/api/compare?run=1&run=2").json()
    assert [run["id"] for run in found["runs"]] == [1, 2]
    assert [(row["run"], row["solver"]) for row in found["summary"]] == [
        (1, "greedy"),
        (1, "independent"),
        (2, "branch-and-bound"),
        (2, "independent"),
    ]
    assert len(found["differences"]) == 12  # what both have: independent
    for each in found["differences"]:
        assert each["objective"][0] == each["objective"][1]
        assert each["pruned_by_all"] == each["prune"][0]


BAD_RUNS: list[tuple[dict[str, Any], int, str]] = [
    ({"bundle": "0" * 64}, 404, "upload it first"),
    ({"bundle": "xyz"}, 422, "bundle"),
    ({"solvers": []}, 422, "solvers"),
    ({"solvers": [{"solver": "greedo"}]}, 422, "did you mean 'greedy'"),
    ({"solvers": [{"solver": "greedy"}] * 2}, 422, "each solver once"),
    ({"solvers": [{"solver": "greedy", "options": {"colour": 1}}]}, 422, "no option 'colour'"),
    ({"solvers": [{"solver": "greedy", "options": {"direction": "up"}}]}, 422, "direction"),
    ({"ratios": [1.0]}, 422, "less than 1"),
    ({"ratios": [0.99], "config": {"protect": True}}, 422, "lower the ratio"),
    ({"limits": {"time_limit": -1}}, 422, "time_limit"),
    ({"limits": {"threads": 0}}, 422, "threads"),
    ({"limits": {"time": 1}}, 422, "time"),
    ({"config": {"readout": "maybe"}}, 422, "readout"),
    ({"method": "grace-op"}, 422, "unknown method 'grace-op'; did you mean 'grace-opt'?"),
    ({"method": "streaming", "method_options": {}}, 422, "selects no channels"),
    ({"method_options": {"buget": "uniform"}}, 422, "has no option 'buget'; did you mean 'budget'?"),
    ({"method_options": {"budget": "equal"}}, 422, "budget"),
    ({"method_options": {"align": 0}}, 422, "align must be at least 1"),
    ({"method_options": {"objective": "logit"}}, 422, "objective is for prompts"),
    ({"method_options": {"sinks": 4}, "config": {"sinks": 4}}, 422, "config.sinks and the method's option sinks"),
    ({"method": "think", "config": {"readout": "static"}}, 422, "no read-out that could be static"),
    ({"ratios": []}, 422, "give ratios or budget_bytes"),
    ({"ratios": [], "budget_bytes": [4000], "value_ratio": 0.5}, 422, "value_ratio goes with ratios"),
    ({"value_ratio": 0.5}, 422, "no graphs of values"),
    ({"ratios": [], "budget_bytes": [1]}, 422, "bytes"),
]


@pytest.mark.parametrize(("changes", "status", "said"), BAD_RUNS)
def test_a_bad_run_is_refused_in_a_sentence(setting: Setting, changes: Any, status: int, said: str) -> None:
    if changes.get("ratios") == [0.99]:  # more than the bundle's protected channels leave
        bundle = load_bundle(HEADS)
        protected = np.arange(64) < 20
        heads = tuple(type(h)(h.layer, h.kv_head, h.kind, h.weights, protected=protected) for h in bundle.heads)
        path = setting.storage.folder / "bundles" / "protected.safetensors"
        save_bundle(type(bundle)(heads, bundle.metadata), path)
        answer = setting.http.post("/api/bundles/register", json={"path": path.name})
        changes = {**changes, "bundle": answer.json()["digest"]}
    assert said in problem_of(setting.submit(**changes), status)
    assert setting.http.get("/api/runs").json()["total"] == 0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(setting: Setting, number: str) -> None:
    body = f'{{"bundle": "{DIGEST}", "solvers": [{{"solver": "greedy"}}], "ratios": [{number}]}}'
    problem_of(setting.http.post("/api/runs", content=body, headers={"Content-Type": "application/json"}), 422)
    option = (
        f'{{"bundle": "{DIGEST}", "solvers": [{{"solver": "auto", "options": {{"x": {number}}}}}], "ratios": [0.5]}}'
    )
    problem_of(setting.http.post("/api/runs", content=option, headers={"Content-Type": "application/json"}), 422)


def test_a_full_queue_says_when_to_come_again(setting: Setting) -> None:
    setting.service.queue_limit = 2
    setting.cluster.gate.clear()
    for _ in range(2):
        assert setting.submit().status_code == 202
    answer = setting.submit()
    assert "try again later" in problem_of(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    setting.cluster.gate.set()
    setting.wait(2)
    assert setting.submit().status_code == 202


# ---------------------------------------------------------------- security


def test_keys_and_scopes(tmp_path: Path) -> None:
    with Setting(tmp_path, None, keys_required=True) as setting:
        keys = {scope: new_key() for scope in ("read", "submit", "admin")}
        for scope, key in keys.items():
            setting.storage.keys.add(scope, key, scope)
        answer = setting.http.get("/api/runs")
        assert "Authorization: Bearer" in problem_of(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        wrong = {"Authorization": f"Bearer {new_key()}"}
        assert "not known" in problem_of(setting.http.get("/api/runs", headers=wrong), 401)
        allowed = {"read": (200, 403, 403), "submit": (200, 201, 403), "admin": (200, 201, 404)}
        for scope, expected in allowed.items():
            setting.http.headers["Authorization"] = f"Bearer {keys[scope]}"
            assert setting.http.get("/api/meta").json()["scope"] == scope
            got = setting.http.get("/api/runs"), setting.upload(), setting.http.delete("/api/runs/9")
            assert tuple(answer.status_code for answer in got) == expected
        assert setting.submit().json()["submitted_by"] == "admin"
        del setting.http.headers["Authorization"]
        assert setting.http.get("/healthz").status_code == 200
        stored = json.dumps(setting.storage.keys.all())
        assert not any(key in stored for key in keys.values())
        answers = [setting.http.get("/api/runs", headers=wrong) for _ in range(15)]
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) >= 1


def test_rates_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = SimpleNamespace(**{**vars(time), "monotonic": lambda: 0.0})  # eight requests may take longer than two s
    monkeypatch.setattr("grace_opt.service.http.access.time", standing)
    with Setting(tmp_path, None, keys_required=True, requests_per_second=2.0) as setting:
        key = new_key()
        setting.storage.keys.add("one", key, "read")
        setting.http.headers["Authorization"] = f"Bearer {key}"
        codes = [setting.http.get("/api/runs").status_code for _ in range(8)]
        assert codes == [200] * 4 + [429] * 4


def test_a_bucket_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    rates = Rates(2, 1.0)
    assert [rates.wait("a") for _ in range(3)] == [0.0, 0.0, 1.0]
    assert rates.wait("b") == 0.0
    clock[0] = 1.5
    assert rates.wait("a") == 0.0


def test_other_sites_and_other_names_get_nothing(setting: Setting) -> None:
    assert "127.0.0.1" in problem_of(setting.http.get("/api/runs", headers={"Host": "evil.example"}), 421)
    said = problem_of(setting.http.post("/api/runs", json={}, headers={"Origin": "http://evil.example"}), 403)
    assert "other sites" in said
    assert setting.http.post("/api/runs", json={}, headers={"Origin": setting.url}).status_code == 422
    answer = setting.http.get("/api/runs")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


# ---------------------------------------------------------------- trouble


def test_a_full_disk_is_said_and_nothing_is_changed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bundle = load_bundle(HEADS)
    path = setting.storage.folder / "bundles" / "three.safetensors"
    save_bundle(type(bundle)(bundle.heads[:3], bundle.metadata), path)
    monkeypatch.setattr(setting.storage.blobs, "adopt", full)
    assert "disk is full" in problem_of(setting.upload(path.read_bytes()), 507)
    assert setting.http.get("/api/bundles").json()["total"] == 1
    assert list((setting.storage.folder / "tmp").iterdir()) == []
    monkeypatch.undo()

    def full_mask(*_: Any) -> None:
        raise InputError("cannot write kv_mask.json: No space left on device") from OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr("grace_opt.compression.mask_file.save_mask", full_mask)
    run = setting.submit().json()["id"]  # its masks cannot be written; it waits
    until(lambda: setting.http.get("/healthz").status_code == 503, "the service says that it waits")
    health = setting.http.get("/healthz").json()
    assert (health["status"], "No space left" in health["trouble"]) == ("waiting", True)
    monkeypatch.undo()
    assert setting.wait(run)["state"] == "complete"
    assert len(setting.http.get(f"/api/runs/{run}/masks").json()) == 1


def test_a_full_database_is_said(tmp_path: Path) -> None:
    with Setting(tmp_path, None) as setting:
        setting.upload()
        with setting.storage.database.engine.connect() as connection:  # the pool hands it out again
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        codes = []
        for _ in range(200):
            answer = setting.submit(name="x" * 200)
            codes.append(answer.status_code)
            if answer.status_code != 202:
                break
        assert codes[-1] in (507, 429)


def test_the_database_goes_away_and_comes_back(tmp_path: Path) -> None:
    program = pg_ctl()
    if program is None:
        skip_without_postgres()
    server = Postgres(str(program))
    try:
        with Setting(tmp_path, new_database(server.url)) as setting:
            setting.upload()
            setting.cluster.gate.clear()
            run = setting.submit(solvers=[{"solver": "branch-and-bound"}]).json()["id"]
            until(lambda: setting.cluster.chunks, "its heads are sent")
            server.stop()
            setting.cluster.gate.set()
            answer = setting.http.get("/api/runs")
            assert "try again" in problem_of(answer, 503)
            assert answer.headers["retry-after"]
            until(lambda: setting.http.get("/healthz").status_code == 503, "the service says that it waits")
            server.start()
            assert setting.wait(run)["done"] == 12
            healthy = {"status": "ok", "trouble": None}
            until(lambda: setting.http.get("/healthz").json() == healthy, "the service is well again")
    finally:
        server.remove()


def test_a_bundle_whose_file_is_lost_fails_its_run(setting: Setting) -> None:
    from grace_opt.service import plan, runner

    setting.cluster.gate.clear()
    setting.service.runner.stop()
    run = setting.submit().json()["id"]
    setting.storage.blobs.path(DIGEST).unlink()
    plan.load_once.cache_clear()
    again = runner.Runner(setting.storage, setting.cluster)
    again.start()
    found = setting.wait(run)
    assert (found["state"], "no such file" in found["error"]) == ("failed", True)
    again.stop()


def test_a_run_that_cannot_be_worked_on_does_not_stop_the_others(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr("grace_opt.service.runner.summarise", broken)
    failed = setting.wait(setting.submit().json()["id"])
    assert (failed["state"], failed["error"]) == ("failed", "a mistake")
    monkeypatch.undo()
    assert setting.wait(setting.submit().json()["id"])["state"] == "complete"


def test_clocks_may_jump(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for moment in ("2031-01-01T00:00:00+00:00", "1999-01-01T00:00:00+00:00"):
        monkeypatch.setattr("grace_opt.service.db.runs.now", lambda moment=moment: moment)
        assert setting.wait(setting.submit().json()["id"])["state"] == "complete"
    assert [run["id"] for run in setting.http.get("/api/runs").json()["runs"]] == [2, 1]


# ---------------------------------------------------------------- about the service


def test_solvers_meta_health_and_metrics(setting: Setting) -> None:
    solvers = {row["solver"]: row for row in setting.http.get("/api/solvers").json()}
    assert solvers["branch-and-bound"]["capabilities"]["exact"]
    assert "direction" in solvers["greedy"]["options"]
    meta = setting.http.get("/api/meta").json()
    assert (meta["api_keys"], meta["scope"]) == (False, "admin")
    setting.wait(setting.submit().json()["id"])
    text = setting.http.get("/metrics").text
    assert 'grace_opt_heads_solved_total{solver="greedy",status="feasible"} 12.0' in text
    assert 'grace_opt_runs{state="complete"} 1.0' in text
    assert problem_of(setting.http.get("/nothing"), 404)


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory, postgres_server: str) -> Iterator[Setting]:
    """A service with a complete run, to be asked anything; PostgreSQL forgives less than SQLite."""
    with Setting(tmp_path_factory.mktemp("explored"), new_database(postgres_server)) as found:
        found.upload()
        found.wait(found.submit().json()["id"])
        yield found


schema = schemathesis.openapi.from_dict(create_app(cast(Service, None)).openapi())


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_there_is_no_5xx(case: Any, explored: Setting) -> None:
    case.call_and_validate(base_url=explored.url, checks=CHECKS)
