"""kill -9 of server and workers while heads are solved: nothing is lost, nothing doubled, nothing different."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from grace_opt import load_bundle, solve_many
from grace_opt.service.client import Client
from grace_opt.service.db.tables import UNFINISHED
from tests.support.serving import Server, many_heads, serving

HEADS = 30
SOLVERS: dict[str, dict[str, Any]] = {"local-search": {"rounds": 1500}}  # some tenths of a second a head
UNIFORM = {"budget": "uniform", "protection": "default"}  # what `GraphBundle.problems` does
CHANGING = ("timing_ns", "trace")


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_the_records_equal_those_of_an_undisturbed_run(tmp_path: Path, storage: str | None, kills: int) -> None:
    bundle = many_heads(tmp_path / "graphs.safetensors", HEADS)
    rng = random.Random(7)
    targets = rng.sample(["server", "worker"], counts=[kills * 2 // 5, kills - kills * 2 // 5], k=kills)
    with serving(tmp_path / "data", storage, "--workers", "2") as (server, client):
        digest = client.upload(bundle).digest

        def submit(ratio: float) -> tuple[float, int]:
            return ratio, client.submit(digest, SOLVERS, [ratio], method_options=UNIFORM).id

        ratios = (pruned / 64 for pruned in range(40, 0, -1))
        runs = [submit(next(ratios))]
        while targets:
            if client.run(runs[-1][1]).state not in UNFINISHED:  # however fast the machine is, there is more to do
                runs.append(submit(next(ratios)))
            time.sleep(rng.uniform(0.1, 0.9))
            if kill(server, targets[-1], rng):
                targets.pop()
        found = [(ratio, client.wait(run), client.records(run), client.masks(run)) for ratio, run in runs]
    for ratio, ended, records, masks in found:
        assert (ended.state, ended.done, ended.total) == ("complete", HEADS, HEADS)
        undisturbed = {
            solution.problem: solution.record()
            for name, options in SOLVERS.items()
            for solution in solve_many(load_bundle(bundle).problems(ratio), name, options=options)
        }
        assert [record["problem"] for record in records] == list(undisturbed)
        for record in records:
            expected = undisturbed[record["problem"]]
            assert {name: record[name] for name in expected if name not in CHANGING} == {
                name: value for name, value in expected.items() if name not in CHANGING
            }
        assert [mask.solver for mask in masks] == list(SOLVERS)


def kill(server: Server, target: str, rng: random.Random) -> bool:
    """kill -9 the server (and start it again), or one of the processes below it; False if there is none yet."""
    if target == "server":
        server.kill()
        server.start()
        return True
    below = server.workers()
    if below:
        with suppress(psutil.NoSuchProcess):
            rng.choice(below).kill()
    return bool(below)


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
