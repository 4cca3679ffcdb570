"""Who may do what: API keys with a scope, limits on rates and sizes, hosts and origins, headers of pages."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grace_opt.service.db.keys import KeyStore
from grace_opt.service.http import failures
from grace_opt.service.http.failures import RefusedError

SCOPES = ("read", "submit", "admin")  #: each may do what those before it may
COOKIE = "grace_opt_key"
KEYS_SECONDS = 2.0  #: after which a key that was added or removed counts
BODY_LIMIT = 1 << 20  #: bytes of a request that is not an upload
FAILURES = (10, 1 / 6)  #: wrong keys of one address: at once, and a second
CLIENTS = 10_000  #: whose rates are remembered
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def new_key() -> str:
    """A new API key of 256 random bits."""
    return f"grace_{secrets.token_urlsafe(32)}"


def is_loopback(host: str) -> bool:
    """Whether a server that binds to this host is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Rates:
    """Token buckets: how often each client may do something."""

    def __init__(self, burst: float, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, at that moment

    def wait(self, client: str, take: bool = True) -> float:
        """Seconds until the client may go on; 0.0 if it may now, which takes one token."""
        now = time.monotonic()
        tokens, then = self._buckets.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        allowed = tokens >= 1.0
        self._buckets[client] = (tokens - (allowed and take), now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self.per_second


@dataclass(frozen=True)
class Caller:
    """Who asks: the name of the key (None without keys) and its scope."""

    name: str | None
    scope: str


class Access:
    """Checks API keys. Without keys (``required`` False) everybody who reaches the server may do everything."""

    def __init__(self, keys: KeyStore, required: bool, per_second: float) -> None:
        self.keys, self.required = keys, required
        self._rates, self._failures = Rates(2 * per_second, per_second), Rates(*FAILURES)
        self._callers: dict[str, Caller] = {}
        self._read = -1.0

    async def caller(self, request: Request) -> Caller:
        """The request's caller. Raises RefusedError: no key, a wrong one, too many requests."""
        if not self.required:
            return Caller(None, "admin")
        key = _key_of(request)
        return await self.check(request, key)

    async def check(self, request: Request, key: str | None) -> Caller:
        """Whose a key is, of a request's sender. Raises RefusedError as `caller` does."""
        if key is None:
            raise RefusedError(401, "an API key is needed: send Authorization: Bearer KEY", www_authenticate="Bearer")
        address = request.client.host if request.client else "unknown"
        _slow_down(self._failures.wait(address, take=False), "wrong API keys")
        caller = (await self._known()).get(hashlib.sha256(key.encode()).hexdigest())
        if caller is None:
            self._failures.wait(address)
            raise RefusedError(401, "this API key is not known; ask for a new one", www_authenticate="Bearer")
        _slow_down(self._rates.wait(str(caller.name)), "requests")
        return caller

    async def _known(self) -> dict[str, Caller]:
        if self._read < 0 or time.monotonic() - self._read > KEYS_SECONDS:
            rows = await run_in_threadpool(self.keys.all)
            self._callers = {row["sha256"]: Caller(row["name"], row["scope"]) for row in rows}
            self._read = time.monotonic()
        return self._callers


def needs(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency of routes: the caller, who must have a scope."""

    async def dependency(request: Request) -> Caller:
        access: Access = request.app.state.service.access
        caller = await access.caller(request)
        if SCOPES.index(caller.scope) < SCOPES.index(scope):
            raise RefusedError(403, f"this needs an API key of scope {scope!r}, and yours is of {caller.scope!r}")
        return caller

    return dependency


def _key_of(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return request.cookies.get(COOKIE)


def _slow_down(seconds: float, what: str) -> None:
    if seconds > 0:
        raise RefusedError(429, f"too many {what}; try again in {seconds:.1f} s", retry_after=str(int(seconds) + 1))


class Guard:
    """Middleware before everything else: hosts, origins and sizes of requests, headers of answers.

    ``hosts``: names under which the server may be addressed (None: any). A page of somebody else's, or a name of
    somebody else's that points to this machine, can make a browser send requests; neither gets further than here.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None, unlimited: str) -> None:
        self.app, self.hosts, self.unlimited = app, hosts, unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, left = Headers(scope=scope), BODY_LIMIT
        unlimited = scope["path"] == self.unlimited
        too_long = 413, f"a request may have {BODY_LIMIT} bytes; only bundles may have more"
        refusal = self._refusal(scope["method"], headers)
        if not unlimited and _length(headers) > BODY_LIMIT:
            refusal = too_long

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                answer.setdefault("Cache-Control", "no-cache")
            await send(message)

        async def answered_in_time(message: Message) -> None:
            if left >= 0:
                await answered(message)

        if refusal is None:
            await self.app(scope, receive if unlimited else limited, answered_in_time)
        if left < 0:  # of a body whose length was not said: whatever the application made of the half of it is dropped
            refusal = too_long
        if refusal is not None:
            await failures.response(*refusal)(scope, receive, answered)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and _hostname(host) not in self.hosts:
            return 421, f"this server is not called {host!r}; address it as {', '.join(self.hosts)}"
        origin = headers.get("origin")
        if method not in ("GET", "HEAD", "OPTIONS") and origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests from pages of other sites are refused"
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _length(headers: Headers) -> int:
    try:
        return int(headers.get("content-length", "0"))
    except ValueError:
        return 0
