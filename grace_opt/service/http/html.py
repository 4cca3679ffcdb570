"""The pages: HTML made here, drawn by the scripts of the offline report and a few lines of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grace_opt.compare import summarise, with_references
from grace_opt.compression.method import METHODS
from grace_opt.records import budget_name, budget_of, budget_words
from grace_opt.reports.report import page_sections, report_data
from grace_opt.service.db.database import Row
from grace_opt.service.db.tables import UNFINISHED, State
from grace_opt.service.http.access import COOKIE, SCOPES, Caller, needs
from grace_opt.service.http.api import (
    BudgetQuery,
    Here,
    LimitQuery,
    OffsetQuery,
    Read,
    RunId,
    existing,
    solver_table,
)
from grace_opt.service.http.failures import RefusedError
from grace_opt.service.http.state import Service
from grace_opt.service.plan import bundle_of, method_of
from grace_opt.service.schemas import RunRequest

router = APIRouter(include_in_schema=False)

PICTURES_OF_RUN = ("summary", "distance", "profile", "map", "kept", "time", "records")
PICTURES_OF_HEAD = ("graph", "incumbent", "time", "records")

Reader = Annotated[Caller, Depends(needs("read"))]


def budgets_in_words(request: Row) -> str:
    """The budgets of a run."""
    return ", ".join(map(budget_words, RunRequest.model_construct(**request).budgets))


def time_in_words(moment: str) -> Markup:
    """A moment of the database, UTC in ISO 8601, to the minute and with its zone."""
    utc = datetime.fromisoformat(moment).astimezone(UTC)
    return Markup('<time datetime="{}">{}\N{NO-BREAK SPACE}UTC</time>').format(moment, f"{utc:%Y-%m-%d %H:%M}")


templates = Environment(
    loader=PackageLoader("grace_opt", "service/http/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters["percent"] = lambda value: "\N{EN DASH}" if value is None else f"{100 * value:.4g} %"
templates.filters["path"] = lambda text: quote(text, safe="")
templates.filters["time"] = time_in_words
templates.filters["budget"] = budget_words
templates.filters["budgets"] = budgets_in_words
templates.filters["query"] = lambda budget: urlencode(
    {name: value for name, value in budget.items() if value is not None}
)


def rendered(request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page of a template."""
    service: Service = request.app.state.service
    common = {"with_keys": service.access.required, "here": request.url.path, "root": request.app.state.site.root}
    return HTMLResponse(templates.get_template(name).render(**values, **common), status)


def redirect(request: Request, path: str) -> RedirectResponse:
    """To another page of the service."""
    return RedirectResponse(request.app.state.site.root + path, 303)


def trouble(request: Request, status: int, detail: str) -> Response | None:
    """A failure as a page, for those who read pages; None for those who read JSON."""
    path = request.url.path
    if path.startswith("/api") or "text/html" not in request.headers.get("accept", ""):
        return None
    if status == 401:
        asked = quote(path) + (f"?{request.url.query}" if request.url.query else "")
        return redirect(request, f"/login?next={quote(asked)}")
    return rendered(request, "trouble.html", status, detail=detail)


@router.get("/")
def runs_page(
    request: Request,
    service: Here,
    caller: Reader,
    state: Annotated[State | None, Query()] = None,
    limit: LimitQuery = 25,
    offset: OffsetQuery = 0,
) -> Response:
    """The runs, and a form for a new one."""
    rows, total = service.storage.runs.page(limit, offset, [state] if state else ())
    bundles = service.storage.bundles.page(200, 0)[0]
    names = {bundle["digest"]: bundle for bundle in bundles}
    for row in rows:
        row["of"] = names.get(row["bundle"]) or service.storage.bundles.find(row["bundle"])
    return rendered(
        request,
        "runs.html",
        runs=rows,
        total=total,
        limit=limit,
        offset=offset,
        state=state,
        states=list(State),
        bundles=bundles,
        solvers=solver_table(),
        methods=[name for name, method in METHODS.items() if method.codec == "channels"],
        may_submit=SCOPES.index(caller.scope) >= SCOPES.index("submit"),
    )


@router.get("/runs/{run}")
def run_page(request: Request, run: RunId, service: Here, caller: Reader) -> Response:
    """A run: facts, masks, and the pictures and tables of a comparison's report."""
    row = existing(service, run)
    return rendered(
        request,
        "run.html",
        run=row,
        bundle=service.storage.bundles.find(row["bundle"]),
        masks=service.storage.masks.of(run),
        unfinished=row["state"] in UNFINISHED,
        sections=Markup(page_sections(*PICTURES_OF_RUN)),
        may_submit=SCOPES.index(caller.scope) >= SCOPES.index("submit"),
    )


@router.get("/runs/{run}/report.json")
def run_report(run: RunId, service: Here, _: Read) -> Response:
    """What the run's page draws; pictures of single heads are on their own pages."""
    row = existing(service, run)
    if row["state"] in UNFINISHED:
        return Response(_run_report(service, run), media_type="application/json")
    return Response(_complete_report(service, run), media_type="application/json")


@lru_cache(maxsize=32)
def _complete_report(service: Service, run: int) -> bytes:
    return _run_report(service, run)


def _run_report(service: Service, run: int) -> bytes:
    records = _referenced(service.storage.records.all(run))
    return _drawn(records, summarise(records), {}, 0) if records else b'{"sets": []}'


@router.get("/runs/{run}/heads/{problem}")
def head_page(request: Request, run: RunId, problem: str, service: Here, _: Read, asked: BudgetQuery) -> Response:
    """A head of a run: its channel graph, incumbent and bound over time, records."""
    row = existing(service, run)
    records = service.storage.records.all(run, problem=problem)
    budgets = list({budget_name(record): budget_of(record) for record in records}.values())
    nothing = not any(value is not None for value in asked.values())
    if not records or not (nothing or asked in budgets):
        raise RefusedError(404, f"run {run} has no record of a head {problem!r}{'' if nothing else ' there'}")
    return rendered(
        request,
        "head.html",
        run=row,
        problem=problem,
        budgets=budgets,
        budget=budgets[0] if nothing else asked,
        sections=Markup(page_sections(*PICTURES_OF_HEAD)),
    )


@router.get("/runs/{run}/heads/{problem}/report.json")
def head_report(run: RunId, problem: str, service: Here, _: Read, budget: BudgetQuery) -> Response:
    """What a head's page draws."""
    row = existing(service, run)
    records = _referenced(service.storage.records.all(run, problem=problem, **budget))
    if not records:
        raise RefusedError(404, f"run {run} has no record of a head {problem!r} there")
    graphs = bundle_of(service.storage.blobs, row["bundle"])
    made = graphs.problems(0.0, protect=method_of(row["request"]).selection.protection is not None)
    found = {
        (row["bundle"], each.name): replace(each, prune=records[0]["prune"]) for each in made if each.name == problem
    }
    return Response(_drawn(records, summarise(records), found, 1), media_type="application/json")


@router.get("/compare")
def compare_page(
    request: Request, service: Here, _: Read, run: Annotated[list[RunId] | None, Query(max_length=8)] = None
) -> Response:
    """Runs side by side, and two masks' kept channels."""
    rows = [existing(service, each) for each in dict.fromkeys(run or [])]
    masks = [mask for row in rows for mask in service.storage.masks.of(row["id"])]
    complete = service.storage.runs.page(100, 0, [State.COMPLETE])[0]
    return rendered(request, "compare.html", runs=rows, masks=masks, complete=complete)


@router.get("/compare/channels.json")
def compared_channels(
    service: Here, _: Read, left: Annotated[str, Query(max_length=200)], right: Annotated[str, Query(max_length=200)]
) -> Response:
    """What two selections of all heads prune; each is named RUN:BUDGET:SOLVER."""
    sides = [_selection(service, each) for each in (left, right)]
    heads = [head for head in sides[0] if head in sides[1]]
    return JSONResponse({"heads": heads, "pruned": [[side[head] for head in heads] for side in sides]})


def _selection(service: Service, name: str) -> dict[str, list[int] | None]:
    run, _, rest = name.partition(":")
    budget, _, solver = rest.partition(":")
    try:
        records = service.storage.records.all(existing(service, int(run))["id"], budget=budget, solver=solver)
    except (ValueError, OverflowError):
        raise RefusedError(422, f"a selection is named RUN:BUDGET:SOLVER, not {name!r}") from None
    return {record["problem"]: record["pruned"] for record in records}


@router.get("/solvers")
def solvers_page(request: Request, _: Read) -> Response:
    """The solvers, what each guarantees and takes."""
    return rendered(request, "solvers.html", solvers=solver_table())


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    """The form for an API key."""
    return rendered(request, "login.html", next=next, detail=None)


@router.post("/login")
async def log_in(request: Request, service: Here) -> Response:
    """Check the key, and let the browser keep it where no script can read it."""
    try:
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=10)
    except ValueError:
        raise RefusedError(422, "the form for a key has two fields, key and next") from None
    key, target = fields.get("key", [""])[0].strip(), _own_page(fields.get("next", ["/"])[0])
    try:
        await service.access.check(request, key)
    except RefusedError as error:
        return rendered(request, "login.html", error.status, next=target, detail=error.detail)
    answer = redirect(request, target)
    answer.set_cookie(value=key, max_age=30 * 86400, **_cookie(request))
    return answer


@router.post("/logout")
def log_out(request: Request) -> Response:
    """Forget the key."""
    answer = redirect(request, "/login")
    answer.delete_cookie(**_cookie(request))
    return answer


def _cookie(request: Request) -> dict[str, Any]:
    """What the key's cookie is, apart from the key."""
    site = request.app.state.site
    secure = site.is_secure(request.url.scheme)
    return {"key": COOKIE, "path": site.root or "/", "httponly": True, "samesite": "strict", "secure": secure}


def _own_page(target: str) -> str:
    """The path and query that were asked for before the login; the list of runs for what may be another site's."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return "/"
    own = not (parts.scheme or parts.netloc) and re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target)
    return target if own else "/"


@router.get("/static/plotly.min.js")
def plotly() -> Response:
    """Plotly's script, out of its own package."""
    import plotly  # type: ignore[import-untyped]

    path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "public, max-age=86400"})


def mount_parts(app: FastAPI) -> None:
    """Serve what the offline report is made of, too."""
    from importlib.resources import files

    from fastapi.staticfiles import StaticFiles

    app.mount("/static/report", StaticFiles(directory=str(files("grace_opt") / "reports" / "assets")))
    app.mount("/static", StaticFiles(directory=str(files("grace_opt") / "service" / "http" / "static")))


def _referenced(records: list[Row]) -> list[Row]:
    """Records with their references, which those of a run that is not complete do not have yet."""
    if all("best_known" in record for record in records):
        return records
    return with_references(records, records, {})


def _drawn(records: Sequence[Row], summary: Sequence[Row], problems: Any, shown: int) -> bytes:
    drawn = report_data(records, summary, problems, {"bundles": {}, "limits": {}}, shown)
    return json.dumps(drawn, allow_nan=False, separators=(",", ":")).encode()
