"""A service in this process."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from grace_opt.engines.dask import Chunk, Cluster
from grace_opt.engines.outcome import run_one
from grace_opt.service.db.storage import Storage
from grace_opt.service.http.app import create_app
from grace_opt.service.http.site import Site
from grace_opt.service.http.state import Service
from tests.support import DATA
from tests.support.patience import PATIENCE, until
from tests.support.serving import live

HEADS = DATA / "heads-smollm2-135m.safetensors"
CONTENT = HEADS.read_bytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OCTETS = {"Content-Type": "application/octet-stream"}


class HereCluster(Cluster):
    """Solves in this process, when asked for what has landed; ``gate`` closed, nothing lands."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.chunks: list[Chunk] = []

    def connect(self) -> None:
        pass

    def room(self) -> int:
        return 2 - len(self.chunks)

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def drop(self, unwanted: Callable[[Chunk], bool]) -> None:
        self.chunks = [chunk for chunk in self.chunks if not unwanted(chunk)]

    def landed(self, timeout: float) -> list[Any]:
        if not self.gate.wait(timeout) or not self.chunks:
            return []
        chunk = self.chunks.pop(0)
        return [(chunk, [run_one(chunk.solver, problem, chunk.limits) for problem in chunk.problems])]


class Setting:
    """A service in this process, with a client of its own."""

    def __init__(self, folder: Path, storage: str | None, site: Site | None = None, **options: Any) -> None:
        self.storage = Storage(folder / "data", storage)
        self.storage.open()
        self.cluster = HereCluster()
        self.service = Service(self.storage, self.cluster, **options)
        site = site or Site(hosts=None if options.get("keys_required") else ("127.0.0.1",))
        self.app = create_app(self.service, site)

    def __enter__(self) -> Setting:
        self._live = live(self.app)
        self.url = self._live.__enter__()
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.http.close()
        self._live.__exit__(None, None, None)

    def upload(self, content: bytes = CONTENT, **query: Any) -> Any:
        return self.http.post("/api/bundles", params=query, content=content, headers=OCTETS)

    def submit(self, headers: dict[str, str] | None = None, **changes: Any) -> Any:
        """Submit a run: at ratio 0.5, the same for every head, unless ``changes`` say otherwise."""
        uniform = {"method_options": {"budget": "uniform"}, "ratios": [0.5]}
        body = {"bundle": DIGEST, "solvers": [{"solver": "greedy"}], **uniform, **changes}
        return self.http.post("/api/runs", json=body, headers=headers)

    def found(self, run: int) -> Any:
        return self.http.get(f"/api/runs/{run}").json()

    def wait(self, run: int) -> Any:
        until(lambda: self.found(run)["state"] not in ("queued", "running"), f"run {run} ends")
        return self.found(run)
