"""Twenty kill -9 of server and workers while heads are solved: nothing is lost, nothing doubled, nothing different."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from serving import Server, many_heads, serving

from grace_opt import load_bundle, solve_many
from grace_opt.service.client import Client
from grace_opt.service.tables import UNFINISHED

HEADS, RATIO, KILLS = 90, 0.6, 20
SOLVERS: dict[str, dict[str, Any]] = {"local-search": {"rounds": 1500}}  # some tenths of a second a head
CHANGING = ("timing_ns", "trace")


def test_the_records_equal_those_of_an_undisturbed_run(tmp_path: Path, storage: str | None) -> None:
    bundle = many_heads(tmp_path / "graphs.safetensors", HEADS)
    rng = random.Random(7)
    kills = {"server": 0, "worker": 0}
    with serving(tmp_path / "data", storage, "--workers", "2") as (server, client):
        run = client.submit(client.upload(bundle).digest, SOLVERS, [RATIO])
        while sum(kills.values()) < KILLS and client.run(run.id).state in UNFINISHED:
            time.sleep(rng.uniform(0.1, 0.9))
            kills[kill_something(server, rng)] += 1
        ended = client.wait(run.id)
        records = client.records(run.id)
        masks = client.masks(run.id)
    assert sum(kills.values()) == KILLS, "the run ended too early to be disturbed; give it more to do"
    assert min(kills.values()) > 2
    assert (ended.state, ended.done, ended.total) == ("complete", HEADS, HEADS)
    undisturbed = {
        solution.problem: solution.record()
        for name, options in SOLVERS.items()
        for solution in solve_many(load_bundle(bundle).problems(RATIO), name, options=options)
    }
    assert [record["problem"] for record in records] == list(undisturbed)
    for record in records:
        expected = undisturbed[record["problem"]]
        assert {name: record[name] for name in expected if name not in CHANGING} == {
            name: value for name, value in expected.items() if name not in CHANGING
        }
    assert [mask.solver for mask in masks] == list(SOLVERS)


def kill_something(server: Server, rng: random.Random) -> str:
    """kill -9 the server (and start it again), or one of the processes below it."""
    below = server.workers()
    if rng.random() < 0.4 or not below:
        server.kill()
        server.start()
        return "server"
    with suppress(psutil.NoSuchProcess):
        rng.choice(below).kill()
    return "worker"


def test_what_was_accepted_is_there_after_a_kill(tmp_path: Path, storage: str | None) -> None:
    bundle = many_heads(tmp_path / "graphs.safetensors", 3)
    with serving(tmp_path / "data", storage, "--workers", "1") as (server, client):
        digest = client.upload(bundle).digest
        runs = [client.submit(digest, ["greedy"], [ratio]).id for ratio in (0.3, 0.4, 0.5)]
        server.kill()
        server.start()
        for run in runs:
            assert client.wait(run).state == "complete"
        assert isinstance(client, Client)
