"""How long a connection may take over what it sends, and how many there may be.

uvicorn waits for the rest of a request for ever, and takes any number of connections. Here each piece has its time:
the head of a request as a whole; of a body, and of an answer that is read, the time between pieces and a least rate,
so that a gigabyte over a slow line still comes through. A stream of events takes as long as it likes.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from grace_opt.service.schemas import Failure

HEAD_BYTES = 64 << 10  #: of a request's line and headers


@dataclass(frozen=True)
class Bounds:
    """Of the connections of one server.

    Args:
        head_seconds: for a request's line and headers, from the connection's begin or the first byte.
        piece_seconds: between two pieces of a body; and for an answer's next piece to be taken.
        bytes_per_second: of a body on average, once ``piece_seconds`` are over.
        connections: at most, beside streams of events.
        streams: of events, at most.
    """

    head_seconds: float = 15.0
    piece_seconds: float = 30.0
    bytes_per_second: float = 500.0
    connections: int = 400
    streams: int = 400


def bounded(bounds: Bounds) -> type[asyncio.Protocol]:
    """The protocol class of a server with these bounds, for `uvicorn.Config(http=...)`."""

    class Bounded(_Connection):
        limits = bounds

    return Bounded


class _Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's connection, with a timer for whatever it waits for."""

    limits = Bounds()
    _timer: asyncio.TimerHandle | None = None
    _waits_for: str | None = None  # "head", "body" or "reader"
    _since = 0.0  # what it waits for began
    _received = 0  # bytes of that

    @property
    def is_stream(self) -> bool:
        """Whether it is one of those that stay open: progress, as events."""
        return self._waits_for is None and self._busy and str(self.cycle.scope["path"]).endswith("/events")

    @property
    def _busy(self) -> bool:
        """Whether a request's head is complete and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _took(self) -> float:
        return float(self.loop.time() - self._since)

    @property
    def _rate(self) -> float:
        """Bytes a second."""
        return self._received / max(self._took, 1e-9)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        streams = sum(each.is_stream for each in self.connections)
        if streams > self.limits.streams or len(self.connections) - streams > self.limits.connections:
            others = [each for each in self.connections if each is not self]
            idle = [each for each in others if not each._busy]
            slow = [each for each in others if each._waits_for == "body"]
            if idle:  # who has asked nothing for the longest time
                min(idle, key=lambda each: each._since).transport.abort()
            elif slow:
                min(slow, key=lambda each: each._rate).transport.abort()
            else:
                self._refuse(503, "the service has as many connections as it takes; try again")
                return
        self._wait_for("head", self.limits.head_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            self._stop()
        elif not self._busy and not (self.cycle is not None and self.cycle.more_body):  # not all of a head is there
            if self._waits_for != "head":
                self._wait_for("head", self.limits.head_seconds)
            self._received += len(data)
            if self._received > HEAD_BYTES:
                self._refuse(431, f"the headers of a request may have {HEAD_BYTES} bytes")
        elif self.cycle.more_body:  # perhaps of a request that was refused before the end of it
            if self._waits_for != "body":
                self._wait_for("body", self.limits.piece_seconds)
            self._received += len(data)
            self._set_timer(self.limits.piece_seconds)
            if self._took > self.limits.piece_seconds and self._rate < self.limits.bytes_per_second:
                self._late()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for("reader", self.limits.piece_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._waits_for == "reader":
            self._stop()

    def _wait_for(self, what: str, seconds: float) -> None:
        self._waits_for, self._since, self._received = what, self.loop.time(), 0
        self._set_timer(seconds)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._late)

    def _stop(self) -> None:
        self._waits_for = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._waits_for == "reader":
            self.transport.abort()  # nothing that is said gets there
        elif self._waits_for == "body" and self.flow.read_paused:  # it is we who do not take it
            self._wait_for("body", self.limits.piece_seconds)
        else:
            self._refuse(408, "the rest of the request did not come in time; send it again")

    def _refuse(self, status: int, detail: str) -> None:
        """Close the connection, with an answer where none has begun."""
        self._stop()
        if not (self._busy and self.cycle.response_started) and (self._busy or self._received or status == 503):
            title = HTTPStatus(status).phrase
            body = Failure(title=title, status=status, detail=detail).model_dump()
            content = json.dumps(body).encode()
            head = f"HTTP/1.1 {status} {title}\r\nContent-Type: application/problem+json\r\nRetry-After: 5\r\n"
            self.transport.write(
                f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
            )
        self.transport.close()
