"""The web application, and the server that runs it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import grace_opt
from grace_opt.errors import InputError
from grace_opt.service import schemas
from grace_opt.service.http import api, failures, html
from grace_opt.service.http.access import LOOPBACK, Guard, is_loopback
from grace_opt.service.http.connections import Bounds, bounded
from grace_opt.service.http.page_cache import FromMemory
from grace_opt.service.http.state import Service

UPLOAD = "/api/bundles"


def create_app(service: Service, *, hosts: tuple[str, ...] | None = LOOPBACK) -> FastAPI:
    """The application of a service, which starts and stops with it.

    Args:
        hosts: names under which it may be addressed; None: any.
    """

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
        docs_url=None,  # it would load scripts from another site
        redoc_url=None,
    )
    app.state.service = service
    failures.install(app, html.trouble)
    app.include_router(api.router)
    app.include_router(api.bare)
    app.include_router(html.router)
    html.mount_parts(app)
    app.add_middleware(FromMemory, service=service)
    app.add_middleware(Guard, hosts=hosts, unlimited=UPLOAD)  # the last one added comes first
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def serve(
    service: Service,
    host: str,
    port: int,
    *,
    ready: Callable[[int], None] = lambda port: None,
    bounds: Bounds | None = None,
) -> None:
    """Serve until a signal raises KeyboardInterrupt, which ends it in the regular way.

    Args:
        ready: is told the port, once it is bound; it matters where ``port`` is 0.
        bounds: of connections, if not the default ones.

    Raises:
        InputError: if the address cannot be bound.
    """
    import uvicorn

    hosts = (*LOOPBACK, host) if is_loopback(host) else None
    config = uvicorn.Config(
        create_app(service, hosts=hosts),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
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


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the upload's body and the failures, which FastAPI cannot know."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        document["components"]["schemas"]["Failure"] = schemas.Failure.model_json_schema()
        for path in document["paths"].values():
            for operation in path.values():
                general = {str(status): what for status, what in failures.responses(400, 413, 421, 422).items()}
                operation["responses"] = {**general, **operation["responses"], "422": general["422"]}
        document["components"].setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
        document["security"] = [{"key": []}, {}]
        binary = {"schema": {"type": "string", "format": "binary"}}
        document["paths"][UPLOAD]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/octet-stream": binary},
        }
        app.openapi_schema = document
    return app.openapi_schema
