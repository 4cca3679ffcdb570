"""The web application, and the server that runs it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

import grace_opt
from grace_opt.errors import InputError
from grace_opt.service.http import api, failures, html, openapi
from grace_opt.service.http.connections import Bounds, bounded
from grace_opt.service.http.guard import Guard
from grace_opt.service.http.page_cache import FromMemory
from grace_opt.service.http.site import Site
from grace_opt.service.http.state import Service


def create_app(service: Service, site: Site = Site()) -> FastAPI:  # noqa: B008  (frozen)
    """The application of a service, which starts and stops with it, as users see it at ``site``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="grace-opt",
        version=grace_opt.__version__,
        summary="Channel pruning of key/value caches as a service: submit graphs, compare solvers, fetch masks.",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
        docs_url=None,  # it would load scripts from another site
        redoc_url=None,
        redirect_slashes=False,  # to an address of its own making; the guard drops a last slash
    )
    app.state.service, app.state.site = service, site
    failures.install(app, html.trouble)
    app.include_router(api.router)
    app.include_router(api.bare)
    app.include_router(html.router)
    html.mount_parts(app)
    app.add_middleware(FromMemory, service=service)
    app.add_middleware(Guard, site=site, unlimited=openapi.UPLOAD)  # the last one added comes first
    app.openapi = lambda: openapi.document(app, site.url)  # type: ignore[method-assign]
    return app


def serve(
    service: Service,
    host: str,
    port: int,
    site: Site,
    trusted_proxies: Sequence[str] = (),
    *,
    ready: Callable[[int], None] = lambda port: None,
    bounds: Bounds | None = None,
) -> None:
    """Serve until a signal raises KeyboardInterrupt, which ends it in the regular way.

    Args:
        site: what users see.
        trusted_proxies: addresses and networks. Who sent a request, and by which scheme, is what X-Forwarded-For and
            -Proto say if it comes from one of them, and from nobody else.
        ready: is told the port, once it is bound; it matters where ``port`` is 0.
        bounds: of connections, if not the default ones.

    Raises:
        InputError: if the address cannot be bound.
    """
    import uvicorn

    config = uvicorn.Config(
        create_app(service, site),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_graceful_shutdown=5,
        http=bounded(bounds or Bounds()),
        ws="none",
    )
    with _bound(host, port) as listener:
        ready(listener.getsockname()[1])
        with suppress(KeyboardInterrupt):  # uvicorn stops in order, and then lets the signal do what it did before
            uvicorn.Server(config).run(sockets=[listener])


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen at {host}, port {port} ({error}); choose another --host or --port") from None
    return listener
