"""Pages of records of complete runs, answered from memory: they never change, and many clients read the same ones."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from grace_opt.service.http import failures
from grace_opt.service.http.failures import RefusedError

if TYPE_CHECKING:
    from grace_opt.service.http.state import Service

PAGES = 1024
BYTES = 64 << 20  #: of all pages together


class Page:
    """A page and its ETag."""

    def __init__(self, run: int, content: bytes) -> None:
        self.run, self.content = run, content
        self.etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    def response(self, if_none_match: str | None) -> Response:
        """The page, or 304 for a client that has it."""
        headers = {"ETag": self.etag}
        if if_none_match == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type="application/json", headers=headers)


class PageCache:
    """The pages that were read last, by path and query."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, str], Page] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, path: str, query: str) -> Page | None:
        """A page, if it is there."""
        return self._pages.get((path, query))

    def keep(self, path: str, query: str, page: Page) -> None:
        """Keep a page of a complete run."""
        with self._lock:
            if (path, query) not in self._pages:
                self._pages[path, query] = page
                self._bytes += len(page.content)
            while len(self._pages) > PAGES or self._bytes > BYTES:
                _, old = self._pages.popitem(last=False)
                self._bytes -= len(old.content)

    def forget(self, run: int) -> None:
        """Drop the pages of a run that was deleted."""
        with self._lock:
            for key in [key for key, page in self._pages.items() if page.run == run]:
                self._bytes -= len(self._pages.pop(key).content)


class FromMemory:
    """Middleware that answers with cached pages, before any routing.

    Of many who ask at once for a page that is not there yet, the first has it made and the others wait for that.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._made: dict[tuple[str, str], asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].endswith("/records"):
            await self.app(scope, receive, send)
            return
        key = scope["path"], scope["query_string"].decode("latin-1")
        page = self.service.pages.get(*key)
        if page is None and key in self._made:
            await self._made[key].wait()
            page = self.service.pages.get(*key)
        if page is None:
            made = self._made.setdefault(key, asyncio.Event())
            try:
                await self.app(scope, receive, send)
            finally:
                made.set()
                self._made.pop(key, None)
            return
        request = Request(scope)
        try:
            await self.service.access.caller(request)  # every scope may read
            response = page.response(request.headers.get("if-none-match"))
        except RefusedError as error:
            response = failures.response(error.status, error.detail, error.headers)
        await response(scope, receive, send)
