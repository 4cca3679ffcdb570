"""What every request passes first: names, paths, origins and sizes; HEAD; headers of answers."""

from __future__ import annotations

from anyio import CancelScope
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grace_opt.service.http import failures
from grace_opt.service.http.site import Site, name_and_port

BODY_LIMIT = 1 << 20  #: bytes of a request that is not an upload
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Middleware before everything else.

    A page of somebody else's, or a name of somebody else's that points to this machine, can make a browser send
    requests; neither gets further than here. What is behind sees paths without the root path, and GET for HEAD.
    """

    def __init__(self, app: ASGIApp, site: Site, unlimited: str) -> None:
        self.app, self.site, self.unlimited = app, site, unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, left = Headers(scope=scope), BODY_LIMIT
        head, path = scope["method"] == "HEAD", self.site.below(scope["path"])
        inner = {**scope, "path": path, "root_path": "", "method": "GET" if head else scope["method"]}
        unlimited = path == self.unlimited
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
                if "GET" in answer.get("allow", "") and "HEAD" not in answer["allow"]:
                    answer["allow"] += ", HEAD"
            await send(message)

        async def answered_in_time(message: Message) -> None:
            if left >= 0:
                await answered(message)

        async def answered_without_body(message: Message) -> None:
            if message["type"] == "http.response.start" and left >= 0:
                await answered(message)
                await send({"type": "http.response.body"})
                enough.cancel()  # a stream would go on

        if refusal is None:
            with CancelScope() as enough:
                sent = answered_without_body if head else answered_in_time
                await self.app(inner, receive if unlimited else limited, sent)
        if left < 0:  # of a body whose length was not said: whatever the application made of the half of it is dropped
            refusal = too_long
        if refusal is not None:
            await failures.response(*refusal)(scope, receive, answered)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host, hosts = headers.get("host", ""), self.site.hosts
        if hosts is not None and name_and_port(host)[0] not in hosts:
            cure = "if users call it so, start it with --public-url or --allowed-host"
            return 421, f"this server is not called {host!r}; address it as {', '.join(hosts)}, or {cure}"
        origin, fetched = headers.get("origin"), headers.get("sec-fetch-site")
        # The browser compares its page with the address that it sends to, which no proxy can change. Where it does not
        # say what it found (over plain HTTP), its page's origin is compared with what is known of that address.
        if fetched is not None:
            own = fetched in ("same-origin", "none")
        else:
            own = origin is None or self.site.is_own(origin, host)
        if method not in SAFE and not own:
            cure = "if it is this service's own page, start the server with --public-url, the address that users type"
            return 403, f"requests from pages of other sites are refused, and this is one of {origin!r}; {cure}"
        return None


def _length(headers: Headers) -> int:
    try:
        return int(headers.get("content-length", "0"))
    except ValueError:
        return 0
