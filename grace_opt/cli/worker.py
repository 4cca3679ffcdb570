"""grace-opt worker."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from grace_opt.cli.options import option


def worker(
    scheduler: Annotated[str, typer.Argument(metavar="SCHEDULER", help="Address of a Dask scheduler.")],
    workers: Annotated[int, option("--workers", help="Worker processes to start.")] = 1,
) -> None:
    """Run workers for a Dask scheduler (dask scheduler starts one) until interrupted."""
    # One thread each: a solver has a process of its own beside its worker, and threads of its own if it wants them.
    more = ["--nworkers", str(workers), "--nthreads", "1", "--no-dashboard"]
    os.execv(sys.executable, [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, *more])
