"""Progress on stderr: a bar that vanishes when done; where nobody watches, a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from grace_opt.cli.output import say

FIRST_LINE, LONGEST_PAUSE = 5.0, 60.0  #: seconds


class Show(Protocol):
    """Says how far the work is."""

    def __call__(self, what: str, done: int = 0, total: int | None = None) -> None:
        """``done`` of ``total`` steps of ``what`` are done; ``total`` None: nobody knows how many there are."""


@contextmanager
def progress(quiet: bool) -> Iterator[Show]:
    """Show how far a piece of work is, until the end of the ``with``; nothing if ``quiet``."""
    if quiet:
        yield _nothing
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        with _lines() as show:
            yield show


def _nothing(what: str, done: int = 0, total: int | None = None) -> None:
    pass


@contextmanager
def _bar() -> Iterator[Show]:
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int = 0, total: int | None = None) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show


@contextmanager
def _lines() -> Iterator[Show]:
    """A line after 5, 10, 20, 40 seconds and then once a minute, also while a single step goes on and on."""
    latest: tuple[str, int, int | None] | None = None
    start, ended = time.monotonic(), threading.Event()

    def show(what: str, done: int = 0, total: int | None = None) -> None:
        nonlocal latest
        latest = what, done, total

    def speak() -> None:
        pause = FIRST_LINE
        while not ended.wait(pause):
            elapsed = time.monotonic() - start
            pause = min(elapsed, LONGEST_PAUSE)
            if latest is not None:
                what, done, total = latest
                steps = f"{done}" if total is None else f"{done} of {total}"
                say(f"{what}: {steps}, {elapsed:.0f} s")

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield show
    finally:
        ended.set()
        speaker.join()
