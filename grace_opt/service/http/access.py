"""Who may do what: API keys with a scope, and how often."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from grace_opt.service.db.keys import KeyStore
from grace_opt.service.http.failures import RefusedError, WrongKeyError

SCOPES = ("read", "submit", "admin")  #: each may do what those before it may
COOKIE = "grace_opt_key"
KEYS_SECONDS = 2.0  #: after which a key that was added or removed counts
FAILURES = (10, 1 / 6)  #: wrong keys of one address: at once, and a second
CLIENTS = 10_000  #: whose rates are remembered


def new_key() -> str:
    """A new API key of 256 random bits."""
    return f"grace_{secrets.token_urlsafe(32)}"


class Rates:
    """Token buckets: how often each client may do something."""

    def __init__(self, burst: float, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, at that moment

    def wait(self, client: str) -> float:
        """Seconds until the client may go on; 0.0 if it may now, which takes one token."""
        now = time.monotonic()
        tokens, then = self._buckets.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        allowed = tokens >= 1.0
        self._buckets[client] = (tokens - allowed, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - tokens) / self.per_second


@dataclass(frozen=True)
class Caller:
    """Who asks: the name of the key (None without keys) and its scope."""

    name: str | None
    scope: str


class Access:
    """Checks API keys. Without keys (``required`` False) everybody who reaches the server may do everything.

    A key that is known is found before anything is counted, and its own rate is all that it is held to: nobody else's
    wrong tries lock it out. Wrong tries are counted by the sender's address. Either way the work is the same.
    """

    def __init__(self, keys: KeyStore, required: bool, per_second: float) -> None:
        self.keys, self.required = keys, required
        self._rates, self._failures = Rates(2 * per_second, per_second), Rates(*FAILURES)
        self._callers: dict[str, Caller] = {}
        self._read, self._reading = -1.0, asyncio.Lock()

    async def caller(self, request: Request) -> Caller:
        """The request's caller. Raises RefusedError: no key, a wrong one, too many requests."""
        if not self.required:
            return Caller(None, "admin")
        key = _key_of(request)
        return await self.check(request, key)

    async def check(self, request: Request, key: str | None) -> Caller:
        """Whose a key is, of a request's sender. Raises RefusedError as `caller` does."""
        if key is None:
            raise WrongKeyError("an API key is needed: send Authorization: Bearer KEY")
        caller = (await self._known()).get(hashlib.sha256(key.encode("utf-8", "replace")).hexdigest())
        if caller is None:
            seconds = self._failures.wait(request.client.host if request.client else "unknown")
            raise WrongKeyError("this API key is not known; ask for a new one", seconds)
        seconds = self._rates.wait(str(caller.name))
        if seconds > 0:
            raise RefusedError(
                429, f"too many requests; try again in {seconds:.1f} s", retry_after=str(int(seconds) + 1)
            )
        return caller

    async def _known(self) -> dict[str, Caller]:
        async with self._reading:  # of many requests at once one reads
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
