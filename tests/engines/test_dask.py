"""Dask workers, of this process and of a cluster; crashes, hangs, kills and lost schedulers."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import psutil
import pytest

from grace_opt import InputError, load_bundle, solve_many
from grace_opt.engines.dask import Chunk, Cluster
from grace_opt.solution import Limit, Limits, Status
from tests.support import DATA, ROOT
from tests.support.faulty import FaultySolver, HoldingSolver, problems
from tests.support.patience import until
from tests.support.serving import free_port, serving

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
HEADS = DATA / "heads-smollm2-135m.safetensors"


@pytest.fixture(scope="module")
def local() -> Iterator[Cluster]:
    """Two workers on this machine."""
    with Cluster(workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A Dask scheduler and two workers, each a process that is not ours."""
    address = f"tcp://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    quiet: dict[str, Any] = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port]
    processes = [subprocess.Popen([*command, "--no-dashboard"], **quiet)]
    processes += [subprocess.Popen([sys.executable, "-m", "grace_opt", "worker", address], **quiet) for _ in range(2)]
    until(lambda: listens(int(port)), "the scheduler listens")
    yield address
    for process in processes:
        for below in psutil.Process(process.pid).children(recursive=True):
            below.kill()
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("solver", ["greedy", "branch-and-bound"])
def test_the_selections_are_those_of_this_process(local: Cluster, solver: str) -> None:
    heads = load_bundle(HEADS).problems(0.6)
    expected = [solution.pruned for solution in solve_many(heads, solver)]
    seen: list[str] = []
    solutions = solve_many(heads, solver, engine=local.outcomes, progress=lambda s: seen.append(s.problem))
    assert [solution.pruned for solution in solutions] == expected
    assert sorted(seen) == sorted(head.name for head in heads)


@pytest.mark.parametrize(("fault", "said"), [("crash", "exit code -11"), ("exit", "exit code 3"), ("raise", "native")])
def test_a_solver_that_dies_twice_is_an_error_of_its_head(local: Cluster, fault: str, said: str) -> None:
    solutions = solve_many(problems(), FaultySolver(fault), engine=local.outcomes)
    assert [s.status for s in solutions] == [Status.FEASIBLE, Status.ERROR, Status.FEASIBLE, Status.FEASIBLE]
    assert said in solutions[1].warnings[0]


def test_a_solver_that_hangs_is_killed_at_its_time_limit(local: Cluster) -> None:
    solutions = solve_many(problems(), FaultySolver("hang"), limits=Limits(time_limit=0.3), engine=local.outcomes)
    assert [s.status for s in solutions] == [Status.FEASIBLE, Status.NO_SOLUTION, Status.FEASIBLE, Status.FEASIBLE]
    assert solutions[1].limit is Limit.TIME


def test_what_is_dropped_is_killed(local: Cluster, tmp_path: Path) -> None:
    heads, begun = problems(), [tmp_path / "one", tmp_path / "other"]
    for file in begun:  # both workers hang, without a time limit
        local.add(Chunk(FaultySolver("hang", str(file)), heads, Limits(), list(range(len(heads)))))
    until(lambda: all(file.exists() for file in begun), "both workers hang")
    local.drop(lambda chunk: True)
    expected = [s.pruned for s in solve_many(heads, FaultySolver())]
    assert [s.pruned for s in solve_many(heads, FaultySolver(), engine=local.outcomes)] == expected


def test_a_worker_that_is_killed_has_its_work_done_by_another(local: Cluster, tmp_path: Path) -> None:
    heads = problems()
    local.add(Chunk(HoldingSolver(folder=str(tmp_path)), heads, Limits(), list(range(len(heads)))))
    until((tmp_path / "begun").exists, "a worker is at work")
    assert local._client is not None
    workers = local._client.run(os.getpid).values()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    (tmp_path / "go").touch()
    landed: list[Any] = []
    until(lambda: landed.extend(local.landed(1.0)) or landed, "the work is done")
    assert [len(results) for _, results in landed] == [len(heads)]
    assert {raw.status for _, results in landed for raw, _ in results} == {Status.FEASIBLE}


def test_a_cluster_of_other_processes(scheduler: str, tmp_path: Path) -> None:
    heads = load_bundle(HEADS).problems(0.6)
    with Cluster(scheduler) as cluster:
        expected = [s.pruned for s in solve_many(heads, "greedy")]
        assert [s.pruned for s in solve_many(heads, "greedy", engine=cluster.outcomes)] == expected
    command = [sys.executable, "-m", "grace_opt", "solve", str(HEADS), "--ratio", "0.6", "--solver", "greedy"]
    command += ["-o", str(tmp_path / "mask"), "--engine", "dask", "--scheduler", scheduler]
    command += ["--budget", "uniform", "--protect"]  # as the problems of the bundle itself are
    done = subprocess.run([*command, "-f", "json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [each["pruned"] for each in json.loads(done.stdout)["records"]] == [list(each) for each in expected if each]
    with serving(tmp_path / "data", None, "--scheduler", scheduler) as (_, client):
        run = client.submit(client.upload(HEADS).digest, ["branch-and-bound"], [0.6])
        assert client.wait(run.id).state == "complete"
        assert {record["status"] for record in client.records(run.id)} == {"optimal"}


def test_the_settings_of_dask_and_of_its_log_are_left_as_they_were() -> None:
    before, log = copy.deepcopy(dask.config.config), logging.getLogger("distributed")
    level = log.level
    with Cluster(workers=1) as cluster:
        assert dask.config.config == before
        assert [s.status for s in solve_many(problems(), "greedy", engine=cluster.outcomes)] == [Status.FEASIBLE] * 4
    assert dask.config.config == before
    assert log.level == level


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_opt.engines.dask.CONNECT_SECONDS", 1.0)
    level = logging.getLogger("distributed").level
    with pytest.raises(InputError, match="no Dask scheduler answers at tcp://127.0.0.1:1 .*dask scheduler"):
        Cluster("tcp://127.0.0.1:1").connect()
    assert logging.getLogger("distributed").level == level
    with pytest.raises(InputError, match="workers must be at least 1"):
        Cluster(workers=0)
