"""The browser that pages are tried in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.support.patience import PATIENCE


def chromium_path() -> str:
    """Where Chromium is."""
    path = os.environ.get("GRACE_OPT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("there is no Chromium; install it (apt-get install chromium) or name it in GRACE_OPT_CHROMIUM")
    return path


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """A browser of these arguments; what is expected of its pages may take as long as the machine needs."""
    path = chromium_path()
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            # /dev/shm of a container may be small
            args=["--no-sandbox", "--disable-dev-shm-usage", *arguments],
            timeout=1000 * PATIENCE,
        )
        yield browser
        browser.close()


def context_of(browser: Browser, **options: Any) -> BrowserContext:
    """A context of its own, as patient: in English and in UTC, whatever the machine's language and zone are."""
    context = browser.new_context(locale="en-GB", timezone_id="UTC", **options)
    context.set_default_timeout(1000 * PATIENCE)
    return context
