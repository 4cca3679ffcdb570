"""Waiting for something that comes sooner or later, on a machine of any speed."""

from __future__ import annotations

import time
from collections.abc import Callable

#: seconds, after which a test gives up: many times what anything here takes, as the machine may be slow and busy
PATIENCE = 300.0


def until(comes: Callable[[], object], what: str) -> None:
    """Wait until ``comes()`` is true. Raises AssertionError, with the words of what did not come."""
    end = time.monotonic() + PATIENCE
    while not comes():
        assert time.monotonic() < end, f"it never came that {what}"
        time.sleep(0.02)
