"""grace-opt worker."""

from __future__ import annotations

from typing import Annotated

import typer

from grace_opt.cli.options import option
from grace_opt.cli.output import say
from grace_opt.errors import InputError


def worker(
    scheduler: Annotated[str, typer.Argument(metavar="SCHEDULER", help="Address of a Dask scheduler.")],
    workers: Annotated[int, option("--workers", help="Worker processes to start.")] = 1,
) -> None:
    """Run workers for a Dask scheduler (dask scheduler starts one) until interrupted."""
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    from grace_opt.engines.dask_workers import run_workers

    say(f"{workers} workers for the Dask scheduler at {scheduler}, for which they wait; Ctrl-C stops them")
    run_workers(scheduler, workers)
