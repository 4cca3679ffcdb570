"""Every failure of the API is a problem+json body (RFC 9457) that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from grace_opt.errors import InputError, shown
from grace_opt.service.db.outages import ReplacedError, is_full, is_outage, reason
from grace_opt.service.db.runs import QueueFullError
from grace_opt.service.schemas import Failure

RETRY_SECONDS = 5
#: pydantic's kinds of errors in our own words; what is in braces comes from the error
WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not known here; leave it out",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "finite_number": "must be a finite number",
    "string_too_long": "may have {max_length} characters",
    "string_too_short": "must have {min_length} characters or more",
    "string_pattern_mismatch": "must be of the form {pattern}",
    "too_long": "may have {max_length} entries",
    "too_short": "must have {min_length} entries or more",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "value_error": "{error}",
    "json_invalid": "is not JSON: {error}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), "must be text"),
    "list_type": "must be a list",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object"),
}


class RefusedError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status code.
        detail: a sentence that names the thing and the cure.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class WrongKeyError(RefusedError):
    """A request without a key that is known; ``seconds`` until the next try, after too many of them."""

    def __init__(self, detail: str, seconds: float = 0.0) -> None:
        if seconds > 0:
            wait = f"too many wrong API keys; try again in {seconds:.1f} s"
            super().__init__(429, wait, retry_after=str(int(seconds) + 1))
        else:
            super().__init__(401, detail, www_authenticate="Bearer")


def response(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says what went wrong."""
    body = Failure(title=HTTPStatus(status).phrase, status=status, detail=detail).model_dump()
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the failures that a route may answer with."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Failure"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({401, 403, 429, 503, *statuses})
    }


def install(app: FastAPI, as_page: Callable[[Request, int, str], Response | None]) -> None:
    """Answer all exceptions that leave a route; ``as_page`` may make a page of one."""

    def answer(request: Request, status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
        detail = shown(detail)  # it may quote the request
        return as_page(request, status, detail) or response(status, detail, headers)

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> Response:
        return answer(request, error.status, error.detail, error.headers)

    @app.exception_handler(WrongKeyError)
    def wrong_key(request: Request, error: WrongKeyError) -> Response:
        # Who reads pages is asked for a key, however often a browser has sent one that is no longer known.
        return as_page(request, 401, error.detail) or response(error.status, error.detail, error.headers)

    @app.exception_handler(InputError)
    def bad_input(request: Request, error: InputError) -> Response:
        cause = error.__cause__
        return trouble(request, cause) if cause is not None and is_outage(cause) else answer(request, 422, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, 422, _said(error.errors()[0], error.body))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(QueueFullError)
    def full(request: Request, error: QueueFullError) -> Response:
        detail = f"{error.args[0]} runs are unfinished, which is as many as this service takes; try again later"
        return answer(request, 429, detail, {"Retry-After": str(RETRY_SECONDS)})

    def trouble(request: Request, error: BaseException) -> Response:
        """Of the database or of a disk."""
        if is_full(error):
            return answer(request, 507, "the service's disk is full; free some space there, nothing was changed")
        if isinstance(error, ReplacedError):
            detail = str(error)
        elif isinstance(error, OSError):
            detail = f"the service cannot read or write its files ({error.strerror}); see its data folder"
        elif is_outage(error):
            detail = "the service's database cannot be reached at the moment; try again"
        elif isinstance(error, DataError | IntegrityError) or not isinstance(error, DBAPIError):
            return refused_value(request, error)
        else:
            detail = f"the service's database does not answer as it should ({reason(error)}); its operator must look"
        return answer(request, 503, detail, {"Retry-After": str(RETRY_SECONDS)})

    def refused_value(request: Request, error: BaseException) -> Response:
        """What the database cannot keep, or no machine can hold."""
        said = reason(error) or type(error).__name__
        return answer(request, 422, f"the service cannot take what this request names ({said}); send smaller values")

    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: ClientDisconnect) -> Response:
        return answer(request, 400, "the request broke off; send it again")  # nobody reads it, nor a traceback

    for outage in (SQLAlchemyError, OSError):
        app.add_exception_handler(outage, trouble)
    for kind in (OverflowError, RecursionError, MemoryError, UnicodeError):
        app.add_exception_handler(kind, refused_value)


def _said(error: Any, body: Any) -> str:
    """A sentence about a field: its place in the request, and what it must be."""
    source, *parts = error["loc"]
    place, within = [str(source)], body if source == "body" else dict.fromkeys(parts)
    for part in parts:  # of a type that may be one of several, the error also names which
        if isinstance(within, list) and isinstance(part, int) and 0 <= part < len(within):
            within = within[part]
        elif isinstance(within, dict) and (part in within or error["type"] == "missing"):
            within = within.get(part)
        else:
            continue
        place.append(str(part))
    words = WORDS.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    given = error.get("input")
    got = f", got {str(given)[:60]!r}" if isinstance(given, str | int | float) and " must be " in f" {words}" else ""
    return f"{'.'.join(place)}: {words}{got}"
