"""The service's commands, against a server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grace_opt import InputError, load_mask
from grace_opt.service.client import Client, ServiceError
from tests.support.patience import until
from tests.support.serving import DATA, Server, free_port, serving

HEADS = DATA / "heads-smollm2-135m.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one worker."""
    with serving(tmp_path_factory.mktemp("service") / "data", None, "--workers", "1") as (found, _):
        yield found


def command(*arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command's output and exit code."""
    more = [] if url is None else ["--url", url]
    line = [sys.executable, "-m", "grace_opt", *arguments, *more]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def failed(*arguments: str, url: str | None = None) -> str:
    """The one sentence of a command that fails."""
    done = command(*arguments, url=url)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr
    return last


def test_submit_status_and_fetch(server: Server, tmp_path: Path) -> None:
    solvers = ["--solver", "greedy", "--solver", "branch-and-bound", "--solver-option", "greedy.direction=backward"]
    options = [*solvers, "--ratio", "0.6", "--budget", "uniform", "--readout", "none", "--name", "nightly", "--wait"]
    done = command("submit", str(HEADS), *options, "-f", "json", url=server.url)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    assert [(r["solver"], r["status"]) for r in records[:2]] == [
        ("greedy", "feasible"),
        ("branch-and-bound", "optimal"),
    ]
    assert len(records) == 24
    listed = command("status", url=server.url).stdout
    assert "complete" in listed
    assert "nightly" in listed
    assert "branch-and-bound" in command("status", "1", url=server.url).stdout
    done = command("fetch", "1", "-o", str(tmp_path / "mask"), url=server.url)
    assert "mask of branch-and-bound at ratio 0.6" in done.stderr
    mask = load_mask(tmp_path / "mask")
    assert (mask.solver["name"], len(mask.key_keep[0][0])) == ("branch-and-bound", 26)
    assert command("fetch", "1", "-o", str(tmp_path / "g"), "--solver", "greedy", url=server.url).returncode == 0
    assert load_mask(tmp_path / "g").solver["options"]["direction"] == "backward"


def test_methods_and_budgets(server: Server, tmp_path: Path) -> None:
    budgets = ("--ratio", "0.5", "--budget-bytes", "2304")
    line = ("submit", str(HEADS), "--solver", "greedy", "--wait", "-f", "json", *budgets)
    done = command(*line, "--method", "grace", "--method-option", "align=8", url=server.url)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    assert [(r["ratio"], r["budget_bytes"], r["prune"]) for r in records[::12]] == [(0.5, None, 32), (None, 2304.0, 32)]
    number = done.stderr.partition("run ")[2].partition(":")[0]
    assert "ratio 0.5, 2304 bytes a token" in command("status", "-f", "json", url=server.url).stdout
    fetch = ("fetch", number, "-o", str(tmp_path / "mask"))
    assert "choose one with --ratio or --budget-bytes" in failed(*fetch, url=server.url)
    done = command(*fetch, "--budget-bytes", "2304", url=server.url)
    assert "mask of greedy at 2304 bytes a token" in done.stderr
    assert load_mask(tmp_path / "mask").align == 8


def test_a_repeated_submission_is_the_same_run(server: Server) -> None:
    line = ("submit", str(HEADS), "--solver", "greedy", "--ratio", "0.3", "--idempotency-key", "build-17", "--wait")
    first, again = (command(*line, url=server.url) for _ in range(2))
    assert first.returncode == again.returncode == 0
    number = first.stderr.partition("run ")[2].partition(":")[0]
    assert f"run {number}:" in again.stderr
    assert command("status", number, "--cancel", url=server.url).returncode == 0


def test_bad_input_is_one_sentence(server: Server, tmp_path: Path) -> None:
    run = ("--solver", "greedy", "--ratio", "0.5")
    (tmp_path / "text").write_text("not a bundle at all")
    assert "not a safetensors file" in failed("submit", str(tmp_path / "text"), *run, url=server.url)
    assert "cannot read" in failed("submit", str(tmp_path / "none"), *run, url=server.url)
    assert "did you mean" in failed("submit", str(HEADS), "--solver", "greedo", "--ratio", "0.5", url=server.url)
    assert "below 1, got 2" in failed("submit", str(HEADS), "--solver", "greedy", "--ratio", "2", url=server.url)
    assert "there is no run 999" in failed("status", "999", url=server.url)
    assert "unknown method 'grase'" in failed("submit", str(HEADS), *run, "--method", "grase", url=server.url)
    assert "give --ratio or --budget-bytes" in failed("submit", str(HEADS), *run[:2], url=server.url)
    assert "floor has no effect" in failed(
        "submit", str(HEADS), *run, "--budget", "uniform", "--floor", "2", url=server.url
    )
    assert "give its id" in failed("status", "--wait", url=server.url)
    assert "there is no run 999" in failed("fetch", "999", "-o", str(tmp_path / "m"), url=server.url)
    assert "grace-opt serve" in failed("status", url=f"http://127.0.0.1:{free_port()}")


def test_a_server_that_cannot_start_says_why(server: Server, tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "data")]
    assert "another server works on" in failed("serve", "--data", server.command[5], "--port", str(free_port()))
    assert "choose another --host or --port" in failed("serve", *data, "--port", str(server.port))
    assert "grace-opt keys add" in failed("serve", *data, "--host", "0.0.0.0")
    assert "storage" in failed("serve", *data, "--storage", "mysql://x")
    assert "positive" in failed("serve", *data, "--upload-limit", "0")


def test_keys(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path / "data")]
    keys = {scope: command("keys", "add", scope, "--scope", scope, *data).stdout.strip() for scope in ("read", "admin")}
    assert all(key.startswith("grace_") for key in keys.values())
    assert "already" in failed("keys", "add", "read", *data)
    assert "must be one of" in failed("keys", "add", "x", "--scope", "root", *data)
    assert "no key 'x'" in failed("keys", "remove", "x", *data)
    rows = json.loads(command("keys", "list", *data, "-f", "json").stdout)["records"]
    assert [(row["name"], row["scope"]) for row in rows] == [("admin", "admin"), ("read", "read")]
    with serving(tmp_path / "data", None, "--workers", "1", "--require-keys") as (server, client):
        with pytest.raises(ServiceError, match="API key is needed") as refused:
            client.runs()
        assert refused.value.status == 401
        with Client(server.url, keys["read"]) as reader:
            assert reader.runs().total == 0
            with pytest.raises(ServiceError, match="scope 'submit'"):
                reader.upload(HEADS)
        assert command("keys", "remove", "read", *data).returncode == 0
        with Client(server.url, keys["admin"]) as admin:
            assert admin.upload(HEADS).heads == 12
            assert {row.solver for row in admin.solvers()} >= {"greedy", "sdp"}


def test_what_answers_may_be_something_else(tmp_path: Path) -> None:
    port = str(free_port())
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "-d", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: "answered 404" in failed("status", url=f"http://127.0.0.1:{port}"), "it says what answered")
    finally:
        other.kill()
        other.wait()
    with pytest.raises(InputError, match="no grace-opt service answers at"):
        Client("ftp://x").runs()
