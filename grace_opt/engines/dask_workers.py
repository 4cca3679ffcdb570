"""Dask itself, and worker processes of ours: which of its settings count, and what they hear of Ctrl-C."""

from __future__ import annotations

import asyncio
import atexit
import copy
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from grace_opt.engines.supervisor import deaf_to
from grace_opt.errors import InputError


def dask_package() -> Any:
    """The package. Raises InputError if the configuration that it reads when it is imported is of no use to it."""
    try:
        import dask
        import distributed  # noqa: F401  (reads its own)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"Dask's configuration cannot be read ({error}); correct the file, or DASK_CONFIG") from None
    return dask


def own_defaults(dask: Any) -> Any:
    """What Dask's package says of ``distributed``, in a copy."""
    return copy.deepcopy(dask.config.merge(*dask.config.defaults)["distributed"])


def run_workers(scheduler: str, count: int) -> None:
    """Run worker processes for a Dask scheduler, until KeyboardInterrupt, which ends them in order.

    Raises:
        InputError: if they cannot be started, or the address is of no scheduler.
    """
    dask_package()
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters of it, we say
    stop, trouble = threading.Event(), []

    async def serve() -> None:
        from distributed import Nanny
        from distributed.core import Status

        # A worker that is still starting when it is closed leaves errors that nobody waits for any more.
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, about: None if stop.is_set() else loop.default_exception_handler(about)
        )
        # One thread each: a solver has a process of its own beside its worker, and threads of its own if it wants them.
        nannies = [Nanny(scheduler, nthreads=1, dashboard=False) for _ in range(count)]
        starting = asyncio.gather(*nannies)
        try:
            while not stop.is_set() and not all(nanny.status == Status.closed for nanny in nannies):
                await asyncio.wait([starting], timeout=0.2) if not starting.done() else await asyncio.sleep(0.2)
                if starting.done():
                    starting.result()
        finally:
            starting.cancel()
            for nanny in nannies:
                if nanny.status != Status.running and nanny.pid is not None:  # it would end in errors of its own
                    with suppress(ProcessLookupError):
                        os.kill(nanny.pid, signal.SIGKILL)
            await asyncio.gather(*(nanny.close(timeout=5) for nanny in nannies), return_exceptions=True)

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            trouble.append(error)

    with deaf_workers():
        thread = threading.Thread(target=run, name="workers")
        thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        stop.set()
        thread.join()
    if trouble and not stop.is_set():
        raise InputError(f"the workers for {scheduler} ended ({trouble[0]}); see that there is one, and run again")


@contextmanager
def deaf_workers() -> Iterator[None]:
    """Workers that are begun here do not hear Ctrl-C nor SIGTERM; those that Dask leaves are killed at exit.

    It leaves one that is still starting when it is closed. multiprocessing would end that by SIGTERM, and wait for it.
    """
    atexit.unregister(_kill_left)
    atexit.register(_kill_left)  # runs before what multiprocessing does at exit
    with deaf_to(signal.SIGINT, signal.SIGTERM):
        yield


def _kill_left() -> None:
    for child in multiprocessing.active_children():
        if child.name.startswith("Dask Worker process"):
            child.kill()
