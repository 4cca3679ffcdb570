"""Shared fixtures: real heads, random problems, tiny models, the real model once a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import DATA

# Before anything imports Triton: the kernel's tests interpret it. TRITON_INTERPRET=0 runs them on a card.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time, so that a red run means a change; `make test-all` looks for new ones. How long an example
# takes says something about the machine, and not about what is tested.
ANY_SPEED: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeat", derandomize=True, **ANY_SPEED)
settings.register_profile("explore", max_examples=500, **ANY_SPEED)
settings.load_profile("repeat")


def pytest_configure(config: pytest.Config) -> None:
    """Markers live here, so that the tests know them from any folder. And Ctrl-C reaches what tests start: a shell
    makes what runs in its background deaf to it, and programs inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "model: runs the real SmolLM2 (fetched once, then cached)")
    config.addinivalue_line("markers", "slow: only in make test-all")


OURS = {"GRACE_OPT_TEST_POSTGRES", "GRACE_OPT_CHROMIUM"}  # settings of the tests themselves
TERMINAL = ("LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plug-ins and no settings from the machine that runs the tests, and a terminal of one kind and width; no proxy
    between a test and its own server; random numbers that do not depend on the tests before."""
    for name in [name for name in os.environ if name.startswith("GRACE_OPT_") and name not in OURS]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRACE_OPT_PLUGINS", "")
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ",".join(filter(None, ["127.0.0.1", "localhost", os.environ.get(name)])))
    if "torch" in sys.modules:  # most tests do without
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The command line, which tests run in this process too, leaves Ctrl-C to the system when it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real SmolLM2 and its tokenizer."""
    from grace_opt.models.load import load_model

    return load_model("smollm2-135m")


@pytest.fixture(params=["smollm2-135m", "qwen2.5-coder-1.5b"])
def real_heads(request: pytest.FixtureRequest) -> Path:
    """A bundle with real heads of n = 64 and of n = 128."""
    return DATA / f"heads-{request.param}.safetensors"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    from tests.support.serving import Postgres, pg_ctl, skip_without_postgres

    given = os.environ.get("GRACE_OPT_TEST_POSTGRES")
    if given:
        yield given
        return
    program = pg_ctl()
    if program is None:
        skip_without_postgres()
    server = Postgres(program)
    yield server.url
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str | None:
    """A database of its own for a test: SQLite in the data folder (None), and PostgreSQL."""
    if request.param == "sqlite":
        return None
    from tests.support.serving import new_database

    return new_database(request.getfixturevalue("postgres_server"))
