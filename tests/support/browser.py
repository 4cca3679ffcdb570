"""The browser that pages are tried in."""

from __future__ import annotations

import os
import shutil

import pytest


def chromium_path() -> str:
    """Where Chromium is."""
    path = os.environ.get("GRACE_OPT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("there is no Chromium; install it (apt-get install chromium) or name it in GRACE_OPT_CHROMIUM")
    return path
