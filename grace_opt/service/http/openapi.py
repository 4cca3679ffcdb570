"""The OpenAPI document: FastAPI's, and what FastAPI cannot know or says in words of a later version."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from grace_opt.service import schemas
from grace_opt.service.http import failures

UPLOAD = "/api/bundles"


def document(app: FastAPI, url: str) -> dict[str, Any]:
    """The document of an application that users find at ``url`` (empty: where the document is).

    Valid OpenAPI 3.1, and such that generated clients get bytes where files are, objects where JSON is, and failures
    of one shape.
    """
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for unused in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(unused, None)
        made["components"]["schemas"]["Failure"] = schemas.Failure.model_json_schema()
        for path in made["paths"].values():
            for operation in path.values():
                _complete(operation)
        made["components"].setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
        made["security"] = [{"key": []}, {}]
        made["servers"] = [{"url": url or "/"}]
        binary = {"schema": {"type": "string", "format": "binary"}}
        made["paths"][UPLOAD]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/octet-stream": binary},
        }
        app.openapi_schema = made
    return app.openapi_schema


def _complete(operation: dict[str, Any]) -> None:
    """The failures that every operation has; streams as text, for what an item of one is has no word in 3.1."""
    general = {str(status): what for status, what in failures.responses(400, 413, 421, 422).items()}
    operation["responses"] = {**general, **operation["responses"], "422": general["422"]}
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            if content.pop("itemSchema", None) is not None:
                content["schema"] = {"type": "string"}
