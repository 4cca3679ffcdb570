"""Half-sent requests end after a bounded time, connections have a limit, slow uploads and streams of events go on."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from grace_opt.service.http.connections import HEAD_BYTES, Bounds, bounded
from tests.support import ROOT
from tests.support.serving import live

SHORT = Bounds(head_seconds=0.3, piece_seconds=0.4, bytes_per_second=2000.0, connections=4, streams=3)
BIG = 64 << 20


async def echo(request: Request) -> Response:
    sha256 = hashlib.sha256()
    async for block in request.stream():
        sha256.update(block)
    return PlainTextResponse(sha256.hexdigest())


async def refuse(request: Request) -> Response:
    return PlainTextResponse("no", status_code=403)


async def big(request: Request) -> Response:
    async def blocks() -> Any:
        for _ in range(BIG >> 20):
            yield bytes(1 << 20)

    return StreamingResponse(blocks())


async def events(request: Request) -> Response:
    async def pieces() -> Any:
        for index in range(1000):
            yield f"data: {index}\n\n"
            await asyncio.sleep(0.25)

    return StreamingResponse(pieces(), media_type="text/event-stream")


ROUTES = [
    Route("/echo", echo, methods=["GET", "POST"]),
    Route("/refuse", refuse, methods=["POST"]),
    Route("/big", big),
    Route("/long", events),
    Route("/runs/1/events", events),
]


def served(bounds: Bounds) -> AbstractContextManager[str]:
    """A server's address."""
    return live(Starlette(routes=ROUTES), http=bounded(bounds), ws="none", timeout_graceful_shutdown=1)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with short limits."""
    with served(SHORT) as found:
        yield found


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A connection of our own."""
    found = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=5)
    with found:
        yield found


def rest(connection: socket.socket) -> bytes:
    """What is said until the connection ends; a reset is an end too."""
    said = b""
    try:
        while block := connection.recv(1 << 16):
            said += block
    except ConnectionResetError:
        pass
    return said


def trickle(connection: socket.socket, piece: bytes, pause: float) -> float:
    """Send a piece again and again until the other side has enough: after how many seconds."""
    began = time.monotonic()
    try:
        while time.monotonic() - began < 5:
            connection.sendall(piece)
            time.sleep(pause)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET /echo HTTP/1.1\r\nHost: x\r\n", b"POST /echo"])
def test_a_head_that_does_not_end_is_given_up(url: str, sent: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(sent)
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 408 ") if sent else said == b""


def test_a_head_that_trickles_is_given_up_in_the_same_time(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"GET /echo HTTP/1.1\r\n")
        assert trickle(connection, b"X: y\r\n", 0.05) < 3


def test_a_head_without_end_is_given_up_before_it_fills_the_memory(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"GET /echo HTTP/1.1\r\n")
        connection.sendall(b"X: " + b"y" * (2 * HEAD_BYTES))
        assert b" 431 " in rest(connection)


@pytest.mark.parametrize("head", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_stops_is_given_up(url: str, head: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        connection.sendall(b"5\r\nhello\r\n")
        assert b"did not come in time" in rest(connection)


def test_a_body_that_trickles_is_given_up(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert trickle(connection, b"x", 0.05) < 3


def test_what_nobody_wants_any_more_is_given_up_too(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert trickle(connection, b"x", 0.05) < 3
        assert rest(connection).count(b"HTTP/1.1") <= 2


def test_a_slow_upload_is_no_half_sent_one() -> None:
    pieces = [bytes([index]) * 1000 for index in range(8)]

    def slowly() -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            time.sleep(0.15)  # in all, longer than any limit

    with served(Bounds(head_seconds=1.0, piece_seconds=1.0, bytes_per_second=100.0)) as url:
        answer = httpx.post(f"{url}/echo", content=slowly())
    assert answer.text == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_an_answer_that_nobody_reads_is_given_up(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.0)
        assert len(rest(connection)) < BIG
    assert len(httpx.get(f"{url}/big").content) == BIG  # with a reader, all of it


def test_who_says_nothing_makes_place_for_who_asks(url: str) -> None:
    with ExitStack() as idle:
        first = [idle.enter_context(connected(url)) for _ in range(SHORT.connections)]
        assert httpx.get(f"{url}/echo").status_code == 200
        assert rest(first[0]) == b""


def test_a_server_that_is_full_says_so(url: str) -> None:
    with ExitStack() as busy:
        for _ in range(SHORT.connections):
            connection = busy.enter_context(connected(url))
            connection.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1)  # an answer under way is not given up for others
        with connected(url) as connection:
            said = rest(connection)
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in said


def test_streams_of_events_take_no_places_and_are_not_cut(url: str) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client())
        streams = [stack.enter_context(client.stream("GET", f"{url}/runs/1/events")) for _ in range(SHORT.streams)]
        idle = [stack.enter_context(connected(url)) for _ in range(SHORT.connections - 1)]
        lines = [stream.iter_lines() for stream in streams]
        for _ in range(6):  # 1.5 s: longer than any limit
            assert [next(line) for line in lines for _ in range(2)]
        assert httpx.get(f"{url}/echo").status_code == 200
        assert len(idle) < SHORT.connections


def test_the_docs_state_the_bounds() -> None:
    said = " ".join((ROOT / "docs" / "service.md").read_text().split())
    bounds = Bounds()
    assert f"head must be there after {bounds.head_seconds:g} s" in said
    assert f"may pause for {bounds.piece_seconds:g} s and must come with {bounds.bytes_per_second:g} bytes" in said
    assert f"{bounds.connections} connections are served at a time, beside {bounds.streams} streams" in said
