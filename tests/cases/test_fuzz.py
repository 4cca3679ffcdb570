"""Nothing that reads files or requests of others ends in anything but success or a sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

HANG = 900  #: seconds, in which a machine of any speed is done


@pytest.mark.parametrize(
    ("first", "count"), [(0, 500), pytest.param(1000, 10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_mutated_files_and_requests_give_sentences(first: int, count: int) -> None:
    """In a process of its own, whose memory and CPU time are limited; it names the case that fails."""
    command = [sys.executable, "-m", "tests.support.fuzz", str(first), str(count)]
    # One arena, one thread: what is limited is what is used, whatever the machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/solvers"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG, check=False
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode().splitlines()
        pytest.fail(f"hangs: {said[-1:]}")
    at = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"at {at}: {done.stderr[-3000:]}"
    assert at == ["done"]
