"""The JSON API under /api, with /healthz and /metrics."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

import grace_opt
from grace_opt import registry
from grace_opt.errors import InputError
from grace_opt.service import schemas
from grace_opt.service.db.database import Row
from grace_opt.service.db.tables import UNFINISHED, State
from grace_opt.service.http import metrics
from grace_opt.service.http.access import Caller, needs
from grace_opt.service.http.failures import RefusedError, responses
from grace_opt.service.http.page_cache import Page
from grace_opt.service.http.state import Service
from grace_opt.service.plan import plan
from grace_opt.solution import Status
from grace_opt.solve import options_of

EVENT_SECONDS = 0.25
IMMUTABLE = "private, max-age=31536000, immutable"

router = APIRouter(prefix="/api", responses=responses())
bare = APIRouter()

Read = Annotated[Caller, Depends(needs("read"))]
Submit = Annotated[Caller, Depends(needs("submit"))]
Admin = Annotated[Caller, Depends(needs("admin"))]
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Not Modified"}}


def _files(media_type: str, schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": schema}}
    return {200: {"description": "The file.", "content": content}, **UNCHANGED, **responses(404)}


JSON_FILE = _files("application/json", {"type": "object", "additionalProperties": True})
TENSORS_FILE = _files("application/octet-stream", {"type": "string", "format": "binary"})

LimitQuery = Annotated[int, Query(ge=1, le=1000, description="how many at most")]
OffsetQuery = Annotated[int, Query(ge=0, le=2**31, description="how many to leave out")]
RunId = Annotated[int, schemas.Field(ge=1, lt=2**63)]


def budget_asked(
    ratio: Annotated[float | None, Query(ge=0, lt=1)] = None,
    value_ratio: Annotated[float | None, Query(ge=0, lt=1)] = None,
    budget_bytes: Annotated[float | None, Query(gt=0, le=1e300)] = None,
) -> dict[str, float | None]:
    """The budget that a query names, as records do; null what it leaves out."""
    return {"ratio": ratio, "value_ratio": value_ratio, "budget_bytes": budget_bytes}


BudgetQuery = Annotated[dict[str, float | None], Depends(budget_asked)]


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(service_of)]


# ---------------------------------------------------------------- bundles


@router.post("/bundles", status_code=201, response_model=schemas.Bundle, responses=responses(413, 422, 507))
async def upload_bundle(
    request: Request,
    service: Here,
    _: Submit,
    name: Annotated[schemas.Text, Query(max_length=200, description="for people")] = "",
    digest: Annotated[schemas.Digest | None, Query(description="refuse the file if its sha256 is another")] = None,
) -> Any:
    """Upload a graph bundle: the file itself is the body (application/octet-stream).

    A bundle that is there already is not stored twice.
    """
    sha256, size, most = hashlib.sha256(), 0, service.upload_limit
    temporary = service.storage.blobs.temporary()
    try:
        with temporary.open("wb") as file:
            async for block in request.stream():
                size += len(block)
                if size > most:
                    raise RefusedError(413, f"a bundle may have {most} bytes (grace-opt serve --upload-limit)")
                sha256.update(block)
                file.write(block)
        found = sha256.hexdigest()
        if digest not in (None, found):
            raise RefusedError(422, f"the file that arrived has sha256 {found}, not {digest}; send it again")
        return await run_in_threadpool(service.adopt_bundle, temporary, found, name or found[:12])
    finally:
        temporary.unlink(missing_ok=True)


@router.post("/bundles/register", status_code=201, response_model=schemas.Bundle, responses=responses(404, 422, 507))
def register_bundle(body: schemas.Registration, service: Here, _: Submit) -> Any:
    """Take a bundle that lies in the folder ``bundles`` of the service's data folder."""
    root = service.storage.offered
    try:
        path = (root / body.path).resolve()
        found = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError):  # no name of a file at all
        found = False
    if not found:
        raise RefusedError(404, f"there is no file {body.path!r} in the folder bundles of the service's data folder")
    return service.register(path)


@router.get("/bundles", response_model=schemas.Bundles)
def list_bundles(service: Here, _: Read, limit: LimitQuery = 50, offset: OffsetQuery = 0) -> Any:
    """Bundles, the newest first."""
    rows, total = service.storage.bundles.page(limit, offset)
    return {"total": total, "offset": offset, "limit": limit, "bundles": rows}


@router.get("/bundles/{digest}", response_model=schemas.Bundle, responses=responses(404))
def get_bundle(digest: schemas.Digest, service: Here, _: Read) -> Any:
    """A bundle by its digest."""
    return _bundle(service, digest)


# ---------------------------------------------------------------- runs


KNOWN: dict[int | str, dict[str, Any]] = {
    200: {"model": schemas.Run, "description": "The run of this Idempotency-Key."}
}


@router.post("/runs", status_code=202, response_model=schemas.Run, responses={**KNOWN, **responses(404, 409, 422, 507)})
def submit_run(
    body: schemas.RunRequest,
    request: Request,
    response: Response,
    service: Here,
    caller: Submit,
    idempotency_key: Annotated[
        str | None,
        Header(max_length=200, description="sent again, it gives the run that it gave the first time (200)"),
    ] = None,
) -> Any:
    """Accept a run. What it answers with survives any crash."""
    _bundle(service, body.bundle)
    asked = body.model_dump()
    total = plan(service.storage.blobs, asked).total  # also finds what is wrong with the request
    key = None
    if idempotency_key is not None:
        key = hashlib.sha256(f"{caller.name}\0{idempotency_key}".encode()).hexdigest()
    row, new = service.storage.runs.submit(asked, total, service.queue_limit, caller.name, key)
    if not new:
        if row["request"] != asked:
            raise RefusedError(409, "this Idempotency-Key was sent with another request; choose a new one")
        response.status_code = 200
    service.runner.notify()
    response.headers["Location"] = f"{request.app.state.site.root}/api/runs/{row['id']}"
    return row


@router.get("/runs", response_model=schemas.Runs)
def list_runs(
    service: Here,
    _: Read,
    state: Annotated[list[State] | None, Query(description="any of these")] = None,
    bundle: schemas.Digest | None = None,
    limit: LimitQuery = 50,
    offset: OffsetQuery = 0,
) -> Any:
    """Runs, the newest first."""
    rows, total = service.storage.runs.page(limit, offset, state or (), bundle)
    return JSONResponse({"total": total, "offset": offset, "limit": limit, "runs": list(map(public, rows))})


@router.get("/runs/{run}", response_model=schemas.Run, responses=responses(404))
def get_run(run: RunId, service: Here, _: Read) -> Any:
    """A run."""
    return JSONResponse(public(existing(service, run)))  # not checked against its model: clients poll it


@router.post("/runs/{run}/cancel", response_model=schemas.Run, responses=responses(404))
def cancel_run(run: RunId, service: Here, _: Submit) -> Any:
    """Stop a run. What it has stays; a run that has ended is left as it is."""
    existing(service, run)
    service.storage.runs.move(run, State.CANCELLED)
    service.runner.notify()
    return existing(service, run)


@router.delete("/runs/{run}", status_code=204, responses=responses(404))
def delete_run(run: RunId, service: Here, _: Admin) -> None:
    """Remove a run with its records and masks."""
    existing(service, run)
    service.storage.runs.delete(run)
    service.pages.forget(run)
    service.runner.notify()


@router.get("/runs/{run}/records", response_model=schemas.Records, responses={**UNCHANGED, **responses(404)})
def list_records(
    run: RunId,
    request: Request,
    service: Here,
    _: Read,
    budget: BudgetQuery,
    solver: Annotated[schemas.Text | None, Query(max_length=100)] = None,
    status: Status | None = None,
    problem: Annotated[schemas.Text | None, Query(max_length=200)] = None,
    sort: schemas.Sort = "id",
    descending: bool = False,
    limit: LimitQuery = 50,
    offset: OffsetQuery = 0,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Any:
    """Records of a run, with filters, sorted; a missing value is last."""
    found = existing(service, run)
    bodies, total = service.storage.records.page(
        run,
        limit=limit,
        offset=offset,
        sort=sort,
        descending=descending,
        solver=solver,
        status=status,
        problem=problem,
        **budget,
    )
    # The bodies are JSON already: a page costs no parsing and no writing.
    content = f'{{"total":{total},"offset":{offset},"limit":{limit},"records":[{",".join(bodies)}]}}'.encode()
    page = Page(run, content)
    if found["state"] not in UNFINISHED:
        service.pages.keep(request.url.path, request.url.query, page)
    return page.response(if_none_match)


async def _existing(run: RunId, service: Here, _: Read) -> Row:
    """Before a stream begins, while there can still be a failure in place of it."""
    return await run_in_threadpool(existing, service, run)


@router.get("/runs/{run}/events", response_class=EventSourceResponse, responses=responses(404))
async def watch_run(
    run: RunId, service: Here, row: Annotated[Row, Depends(_existing)]
) -> AsyncIterator[ServerSentEvent]:
    """Progress as server-sent events: ``progress`` with state, done and total, at last ``end`` with the same."""
    said: Row = {}
    while row["state"] in UNFINISHED:
        if row != said:
            said = row
            yield ServerSentEvent(event="progress", data={name: row[name] for name in ("state", "done", "total")})
        await asyncio.sleep(EVENT_SECONDS)
        working = service.runner.progress(run)  # from memory: watching costs the database nothing
        if working is not None:
            row = {**row, **asdict(working)}
        else:
            row = await run_in_threadpool(_row, service, run)
    yield ServerSentEvent(event="end", data={name: row[name] for name in ("state", "done", "total")})


@router.get("/runs/{run}/masks", response_model=list[schemas.Mask], responses=responses(404))
def list_masks(run: RunId, service: Here, _: Read) -> Any:
    """The masks of a run: one for each budget and solver that has a selection for every head."""
    existing(service, run)
    return service.storage.masks.of(run)


@router.get("/masks/{digest}.json", response_class=FileResponse, responses=JSON_FILE)
def get_mask_json(
    digest: schemas.Digest, service: Here, _: Read, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """kv_mask.json; it names the sha256 of kv_mask.safetensors."""
    return _mask_file(service, digest, "digest", "kv_mask.json", "application/json", if_none_match)


@router.get("/masks/{digest}.safetensors", response_class=FileResponse, responses=TENSORS_FILE)
def get_mask_tensors(
    digest: schemas.Digest, service: Here, _: Read, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """kv_mask.safetensors of the mask whose kv_mask.json has this digest."""
    return _mask_file(service, digest, "tensors", "kv_mask.safetensors", "application/octet-stream", if_none_match)


@router.get("/compare", response_model=schemas.Comparison, responses=responses(404, 422))
def compare_runs(
    service: Here, _: Read, run: Annotated[list[RunId], Query(min_length=2, max_length=8, description="ids")]
) -> Any:
    """Runs side by side."""
    return service.compared([existing(service, each) for each in dict.fromkeys(run)])


# ---------------------------------------------------------------- about the service


@router.get("/solvers", response_model=list[schemas.SolverInfo])
def list_solvers(_: Read) -> Any:
    """The solvers that runs may name, what each guarantees and takes."""
    return solver_table()


@router.get("/meta", response_model=schemas.Meta)
def get_meta(service: Here, caller: Read) -> Any:
    """What this service is and allows."""
    return {
        "version": grace_opt.__version__,
        "api_keys": service.access.required,
        "scope": caller.scope,
        "upload_limit": service.upload_limit,
        "queue_limit": service.queue_limit,
        "workers": service.cluster.workers,
    }


WAITING: dict[int | str, dict[str, Any]] = {503: {"model": schemas.Health, "description": "Waiting."}}


@bare.get("/healthz", response_model=schemas.Health, responses=WAITING, openapi_extra={"security": []})
def health(service: Here, response: Response) -> Any:
    """200 if the service does its work, 503 while it waits for its database or its workers. Needs no key."""
    trouble = service.runner.trouble if service.runner.is_alive() else "the runner has ended; restart the server"
    if trouble is not None:
        response.status_code = 503
    return {"status": "ok" if trouble is None else "waiting", "trouble": trouble}


@bare.get("/metrics", response_class=PlainTextResponse)
def get_metrics(service: Here, _: Read) -> Response:
    """Counters for Prometheus."""
    content, media_type = metrics.exposition(service)
    return Response(content, media_type=media_type)


@cache
def solver_table() -> list[Row]:
    """All solvers with their options and capabilities."""
    rows = []
    for info in registry.solvers():
        row: Row = {"solver": info.name, "guarantee": info.guarantee, "needs": info.needs, "origin": info.origin}
        try:
            solver = registry.create(info.name)
            rows.append({**row, "options": options_of(solver), "capabilities": asdict(solver.capabilities)})
        except InputError:
            rows.append({**row, "options": {}, "capabilities": None})
    return rows


def existing(service: Service, run: int) -> Row:
    """A run, with its newest progress. Raises RefusedError if there is none."""
    row = service.storage.runs.find(run)
    if row is None:
        raise RefusedError(404, f"there is no run {run}")
    return row


def public(row: Row) -> Row:
    """The fields of a run that its model has."""
    return {name: value for name, value in row.items() if name in schemas.Run.model_fields}


def _row(service: Service, run: int) -> Row:
    """A run; one that was deleted meanwhile counts as cancelled."""
    return service.storage.runs.find(run) or {"state": State.CANCELLED, "done": 0, "total": 0}


def _bundle(service: Service, digest: str) -> Row:
    row = service.storage.bundles.find(digest)
    if row is None:
        raise RefusedError(404, f"there is no bundle {digest}; upload it first")
    if not service.storage.blobs.is_sound(digest):
        raise RefusedError(404, f"the file of bundle {digest} is lost or damaged; upload it again")
    return row


def _mask_file(
    service: Service, digest: str, column: str, name: str, media_type: str, if_none_match: str | None
) -> Response:
    row = service.storage.masks.find(digest)
    if row is None:
        raise RefusedError(404, f"there is no mask {digest}")
    headers = {"ETag": f'"{row[column]}"', "Cache-Control": IMMUTABLE}
    if if_none_match == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if not service.storage.blobs.is_sound(row[column]):
        raise RefusedError(404, f"the file of mask {digest} is lost or damaged; submit its run again")
    path = service.storage.blobs.path(row[column])
    return FileResponse(path, media_type=media_type, filename=name, headers=headers)
