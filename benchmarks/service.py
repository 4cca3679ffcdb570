"""The service's overhead, latencies and first pages.

    python benchmarks/service.py BUNDLE [--heads 256] [--storage URL] [-f json]

Three measurements on one server with two workers: the time of a run of branch and bound against `grace_opt.solve_many`
on the same heads (the heads of BUNDLE, over and over, with channels scaled a little differently each time, so that none
is solved twice); 200 clients that read pages of records at the same time, each as fast as it can and then each once a
second; the first page of a run of 10,000 records. Numbers are wall-clock seconds; the load comes from this process,
which shares the machine's cores with the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from grace_opt import solve_many
from grace_opt.engines.dask import Cluster
from grace_opt.graphs import GraphBundle, HeadGraph, load_bundle, save_bundle
from grace_opt.heads import HeadName
from grace_opt.service.client import Client
from grace_opt.service.db.storage import opened
from grace_opt.service.db.tables import State

CLIENTS = 200
WORKERS = 2
UNIFORM = {"budget": "uniform"}  # the problems that `GraphBundle.problems` makes
PATHS = ("records?limit=50", "records?sort=gap&limit=50", "records?sort=time&descending=true&limit=50&offset=50")


def more_heads(bundle: GraphBundle, count: int, seed: int) -> GraphBundle:
    """So many heads: the bundle's own with their channels scaled at random between 0.95 and 1.05."""
    rng, heads = np.random.default_rng(seed), []
    for index in range(count):
        weights = bundle.heads[index % len(bundle.heads)].weights
        scale = rng.uniform(0.95, 1.05, len(weights))
        scaled = weights * np.outer(scale, scale)
        heads.append(HeadGraph(index // 4, index % 4, "key", (scaled + scaled.T) / 2))
    return GraphBundle(tuple(heads), bundle.metadata)


@contextmanager
def serving(folder: Path, storage: str | None) -> Iterator[Client]:
    """A server in a process of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    more = [] if storage is None else ["--storage", storage]
    command = [sys.executable, "-m", "grace_opt", "serve", "--data", str(folder), "--port", port, *more]
    server = subprocess.Popen([*command, "--workers", str(WORKERS)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        with Client(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.terminate()
        server.wait()


def overhead(client: Client, bundle: GraphBundle, heads: int, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Times of the service and of `solve_many`, in turn, on the same fresh heads each time."""
    times: dict[str, list[float]] = {"service": [], "solve_many, processes": [], "solve_many, threads": []}
    warm = save(more_heads(bundle, 8, 99), folder)
    client.wait(client.submit(client.upload(warm).digest, ["branch-and-bound"], [0.6], method_options=UNIFORM).id)
    with Cluster(workers=WORKERS) as cluster:
        solve_many(more_heads(bundle, 8, 99).problems(0.6), "branch-and-bound", engine=cluster.outcomes)
        times["solve_many, Dask"] = []
        for repeat in range(repeats):
            made = more_heads(bundle, heads, repeat)
            problems = made.problems(0.6)
            digest = client.upload(save(made, folder)).digest
            began = time.perf_counter()
            run = client.submit(digest, ["branch-and-bound"], [0.6], method_options=UNIFORM)
            with httpx.stream("GET", f"{client.url}/api/runs/{run.id}/events", timeout=600) as events:
                for _ in events.iter_lines():
                    pass
            times["service"].append(time.perf_counter() - began)
            ways: dict[str, dict[str, Any]] = {
                "solve_many, threads": {"workers": WORKERS},
                "solve_many, processes": {"workers": WORKERS, "isolate": True},
                "solve_many, Dask": {"engine": cluster.outcomes},
            }
            for name, options in ways.items():
                began = time.perf_counter()
                solve_many(problems, "branch-and-bound", **options)
                times[name].append(time.perf_counter() - began)
    rows = [{"measurement": f"run of {heads} heads, {name}", "seconds": min(found)} for name, found in times.items()]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["service"], found, strict=True))
        for name, found in times.items()
    }
    return [{**row, "service_over": ratios[name]} for row, name in zip(rows, times, strict=True)]


def save(bundle: GraphBundle, folder: Path) -> Path:
    """A file of the bundle."""
    save_bundle(bundle, folder / "made.safetensors")
    return folder / "made.safetensors"


async def reader(port: int, run: int, until: float, pause: float, seen: list[float], errors: list[str]) -> None:
    """One client: a connection of its own, page after page."""
    stream, sink = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(pause * np.random.default_rng(id(stream) % 2**32).uniform())
    turn = 0
    while time.perf_counter() < until:
        path = f"/api/runs/{run}/{PATHS[turn % len(PATHS)]}"
        turn += 1
        began = time.perf_counter()
        sink.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await stream.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            errors.append(head.decode(errors="replace").partition("\r\n")[0])
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await stream.readexactly(int(length.partition(b":")[2]))
        seen.append(time.perf_counter() - began)
        if pause:
            await asyncio.sleep(max(0.0, pause - seen[-1]))
    sink.close()


def latencies(port: int, run: int, pause: float, seconds: float) -> dict[str, Any]:
    """What `CLIENTS` clients see."""
    seen: list[float] = []
    errors: list[str] = []

    async def all_clients() -> None:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(reader(port, run, until, pause, seen, errors) for _ in range(CLIENTS)))

    asyncio.run(all_clients())
    ordered = sorted(seen)
    return {
        "measurement": f"{CLIENTS} clients, {'once a second each' if pause else 'as fast as they can'}",
        "requests_per_second": len(seen) / seconds,
        "p50_s": ordered[len(ordered) // 2],
        "p99_s": ordered[int(0.99 * len(ordered))],
        "errors": len(errors),
    }


def big_run(folder: Path, url: str | None, count: int) -> int:
    """A complete run of so many records, made of those of the first run, written straight into the database."""
    with opened(folder, url) as storage:
        first = storage.records.all(1)
        request = storage.runs.find(1)["request"]  # type: ignore[index]
        run = int(storage.runs.submit(request, count, 10**6, None, None)[0]["id"])
        made = [
            {**first[i % len(first)], "problem": str(HeadName(i // 8, i % 8, "key")), "gap": i / count}
            for i in range(count)
        ]
        storage.runs.move(run, State.RUNNING)
        storage.records.add(run, made)
        storage.runs.finish(run, made, [], [])
    return run


def first_pages(client: Client, run: int, count: int) -> list[dict[str, Any]]:
    """Times of the first page of a big run: not seen before, sorted not seen before, and again."""
    rows = []
    http = httpx.Client(base_url=client.url)
    for what, query in (("first page", "limit=50"), ("sorted by gap", "limit=50&sort=gap"), ("again", "limit=50")):
        began = time.perf_counter()
        http.get(f"/api/runs/{run}/records?{query}").raise_for_status()
        seconds = time.perf_counter() - began
        rows.append({"measurement": f"{count} records, {what}", "seconds": seconds})
    return rows


def main(
    bundle: Path,
    heads: Annotated[int, typer.Option(help="Of the run that is timed.")] = 256,
    records: Annotated[int, typer.Option(help="Of the run whose first page is timed.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="For which the clients read.")] = 10.0,
    repeats: Annotated[int, typer.Option(help="Of the run that is timed.")] = 3,
    storage: Annotated[str | None, typer.Option(help="As of grace-opt serve.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table or json.")] = "table",
) -> None:
    """Measure and print."""
    graphs = load_bundle(bundle)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with serving(folder / "data", storage) as client:
            rows: list[dict[str, Any]] = overhead(client, graphs, heads, folder, repeats)
        run = big_run(folder / "data", storage, records)
        with serving(folder / "data", storage) as client:
            rows += first_pages(client, run, records)
            port = int(client.url.rpartition(":")[2])
            rows += [latencies(port, run, pause, seconds) for pause in (0.0, 1.0)]
    show(rows, format)


def show(rows: Sequence[dict[str, Any]], format: str) -> None:
    """Print the records."""
    if format == "json":
        print(json.dumps({"records": list(rows)}))
        return
    for row in rows:
        values = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "measurement")
        print(f"{row['measurement']:45s} {values}")


if __name__ == "__main__":
    typer.run(main)
