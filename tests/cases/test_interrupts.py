"""Ctrl-C and SIGTERM, to all processes as terminals and service managers send them: no traceback, nobody left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.serving import free_port


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grace_opt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal to all processes of a command; what it says from then on."""
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert psutil.wait_procs(below, timeout=20)[1] == []
    return said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
def test_serve_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    environment = {"DASK_DISTRIBUTED__NANNY__PRELOAD": "no_such_module"}  # for a cluster of somebody's, not for ours
    with started("serve", "--data", str(tmp_path / "d"), "--port", "0", "--workers", "1", **environment) as process:
        assert process.stdout is not None
        url = re.findall(r"http://127\.0\.0\.1:[1-9]\d*", process.stdout.readline())[0]  # the port that it got
        with httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=10)) as client:
            while client.get("/healthz").status_code != 200:
                time.sleep(0.1)
        said = ended(process, number)
    assert (process.returncode, said) == (0, "")


@pytest.mark.parametrize("workers", ["1", "3"])  # of three, two are still starting
def test_worker_ends_in_order(workers: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    scheduler = subprocess.Popen([*command, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with started("worker", f"tcp://127.0.0.1:{port}", "--workers", workers) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any("Registered to" in line for line in lines)
            said = ended(process, signal.SIGINT)
        assert process.returncode == 0
        assert "Traceback" not in said
    finally:
        scheduler.kill()
        scheduler.wait()


def test_a_worker_that_dask_leaves_is_killed_at_exit() -> None:
    """One that does not hear SIGTERM, by which multiprocessing would end it."""
    program = """if __name__ == "__main__":
    import multiprocessing, time
    from grace_opt.engines.dask_workers import deaf_workers
    with deaf_workers():
        context = multiprocessing.get_context("spawn")
        left = context.Process(target=time.sleep, args=(600,), name="Dask Worker process (from Nanny)", daemon=True)
        left.start()
    print(left.pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not psutil.pid_exists(int(done.stdout))


def test_a_configuration_of_dask_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("{: bad")
    with started("worker", "tcp://127.0.0.1:1", DASK_CONFIG=str(tmp_path / "bad.yaml")) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "error: Dask's configuration cannot be read" in said
    assert "Traceback" not in said
