"""What the tests of the service share: databases, bundles of any number of heads, a server in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from sqlalchemy import create_engine, make_url, text

from grace_opt.graphs import GraphBundle, HeadGraph, load_bundle, save_bundle
from grace_opt.service.client import Client
from tests.support import DATA
from tests.support.patience import PATIENCE, until

PLACES = ("/usr/lib/postgresql", "/usr/local/pgsql", "/opt/homebrew/opt/postgresql")


def many_heads(path: Path, count: int) -> Path:
    """A bundle of so many heads of 64 channels: real ones, each channel scaled a little differently."""
    real = load_bundle(DATA / "heads-smollm2-135m.safetensors")
    rng = np.random.default_rng(0)
    heads = []
    for index in range(count):
        scale = rng.uniform(0.9, 1.1, 64) if index >= len(real.heads) else np.ones(64)
        weights = real.heads[index % len(real.heads)].weights * np.outer(scale, scale)
        heads.append(HeadGraph(index // 3, index % 3, "key", (weights + weights.T) / 2))
    about = {**real.metadata, "num_key_value_heads": "3", "num_hidden_layers": str(count // 3)}
    save_bundle(GraphBundle(tuple(heads), about), path)
    return path


def pg_ctl() -> str | None:
    """The program that starts PostgreSQL, if it is installed."""
    found = shutil.which("pg_ctl")
    if found is not None:
        return os.path.realpath(found)
    places = (path for place in PLACES for path in sorted(Path(place).glob("**/bin/pg_ctl"), reverse=True))
    return next(map(str, places), None)


class Postgres:
    """A PostgreSQL server of the tests' own, on a socket in a folder of its own."""

    def __init__(self, program: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path must be short
        self.bin = Path(program).parent
        # PostgreSQL refuses to run as root, which is who runs CI.
        self.user = "nobody" if os.getuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user)
            self.folder.chmod(0o711)  # for a root that may not do everything
        self._run("initdb", "-D", str(self.folder / "data"), "-A", "trust", "-U", "test", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        """Of the database that is always there."""
        return f"postgresql://test@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start the server."""
        options = f"-c listen_addresses='' -k {self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        """Stop it, and drop every connection."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def remove(self) -> None:
        """Stop it for good."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(  # noqa: PLW1510  (looked at below)
            command,
            user=self.user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 0, done.stderr.decode()


def new_database(url: str) -> str:
    """A database of its own on a server: its URL."""
    name = f"grace_opt_{os.urandom(6).hex()}"
    admin = make_url(url).set(drivername="postgresql+psycopg")
    engine = create_engine(admin, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def free_port() -> int:
    """A port that nobody listens at, and that is nobody else's until these tests end.

    It stays bound here, to a socket that does not listen: Linux gives it to nobody who asks for any port, and lets a
    server of the tests listen at it, again and again, as both sockets say SO_REUSEADDR.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = int(holder.getsockname()[1])
    if sys.platform == "linux":
        _HELD.append(holder)
    else:
        holder.close()
    return port


_HELD: list[socket.socket] = []


class Server:
    """`grace-opt serve` in a process of its own."""

    def __init__(self, data: Path, storage: str | None, *more: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        storage_option = [] if storage is None else ["--storage", storage]
        self.command = [sys.executable, "-m", "grace_opt", "serve", "--data", str(data), "--port", str(self.port)]
        self.command += [*storage_option, *more]
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until(self._answers, "the server answers")

    def _answers(self) -> bool:
        try:
            httpx.get(f"{self.url}/healthz", trust_env=False)
        except httpx.TransportError:
            assert self.process.poll() is None, self.process.communicate()[0].decode()
            return False
        return True

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """All processes below it: Dask's workers and the solvers' processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Ctrl-C; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


@contextmanager
def serving(data: Path, storage: str | None = None, *more: str) -> Iterator[tuple[Server, Client]]:
    """A server and a client of it."""
    server = Server(data, storage, *more)
    try:
        with Client(server.url) as client:
            yield server, client
    finally:
        server.stop()


@contextmanager
def live(app: Any, **options: Any) -> Iterator[str]:
    """An application served by a thread, with more ``options`` of uvicorn's: its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who comes before the server is up waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def skip_without_postgres() -> Any:
    """For machines without PostgreSQL; CI fails if anything is skipped."""
    return pytest.skip("PostgreSQL is not installed (pg_ctl), and GRACE_OPT_TEST_POSTGRES names no server")
