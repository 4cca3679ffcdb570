"""The service's pages in a real browser: everything is drawn, nothing goes wrong, nothing is fetched from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from grace_opt.service.db.tables import State
from grace_opt.service.http.access import COOKIE, new_key
from tests.support.browser import chromium, context_of
from tests.support.setting import DIGEST, Setting

HOSTILE = '<script>alert(1)</script> & "more"'
HEAD = "layers.8.kv_heads.1.key"
PICTURES = ("distance", "profile", "map", "kept", "time")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A service with two complete runs, of a bundle and a name that mean no good."""
    with Setting(tmp_path_factory.mktemp("pages"), None) as found:
        found.upload(name=HOSTILE)
        solvers = [{"solver": name} for name in ("independent", "greedy", "branch-and-bound")]
        found.wait(found.submit(solvers=solvers, ratios=[0.6, 0.4], name=HOSTILE).json()["id"])
        backward = [{"solver": "greedy", "options": {"direction": "backward"}}]
        found.wait(found.submit(solvers=backward, ratios=[0.6]).json()["id"])
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Browser, setting: Setting) -> Iterator[Open]:
    """Opens pages; at the end nothing may have been said on the console, or fetched from another server."""
    wrong: list[str] = []
    contexts = []

    def opened(path: str, scheme: str = "light", base: str = setting.url, allowed: str = "none") -> Page:
        context = context_of(browser, viewport={"width": 1366, "height": 768}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()

        def heard(text: str) -> None:
            if allowed not in text:
                wrong.append(text)

        page.on("console", lambda message: heard(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((base, "data:", "blob:")) else wrong.append(r.url))
        page.goto(base + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def drawn(page: Page, picture: str) -> list[dict[str, Any]]:
    """The traces of a picture, once it is there, and that it is seen."""
    page.wait_for_selector(f"#{picture} .main-svg", state="attached")
    box = page.locator(f"#{picture} .main-svg").first.bounding_box()
    assert box is not None
    assert box["width"] > 600
    assert page.locator(f"#{picture} .annotation").count() == 0  # nothing says that there is nothing to see
    found: list[dict[str, Any]] = page.evaluate("id => document.getElementById(id).data", picture)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_list_of_runs(visit: Open, setting: Setting, scheme: str) -> None:
    page = visit("/", scheme)
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    first = page.locator("#runs tbody tr").nth(1)
    assert first.locator("th a").get_attribute("href") == "/runs/1"
    assert HOSTILE in first.inner_text()  # as text
    assert page.locator("#runs script").count() == 0
    assert "72 of 72" in first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    page.locator("nav[aria-label='State of runs'] a", has_text="failed").click()
    expect(page.locator("main")).to_contain_text("There is no such run")
    assert setting.http.get("/?state=nonsense", headers={"Accept": "text/html"}).status_code == 422


def test_a_run_is_submitted_and_watched(visit: Open, setting: Setting) -> None:
    page = visit("/")
    setting.cluster.gate.clear()
    page.get_by_label("Method").select_option("think")
    page.get_by_label("Ratios").fill("0.3, 0.5")
    page.get_by_label("Name").fill("from the form")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/runs/3")
    assert page.locator("#count").inner_text() == "0 of 48"
    listed = visit("/")
    expect(listed.locator("#runs tr[data-live]")).to_have_count(1)
    setting.cluster.gate.set()
    expect(page.locator("#state")).to_have_text("complete")  # by itself
    expect(page.locator("#masks tbody tr")).to_have_count(4)
    expect(listed.locator("#runs tbody tr").first).to_contain_text("48 of 48")
    expect(listed.locator("#runs tr[data-live]")).to_have_count(0)
    setting.cluster.gate.clear()
    other = setting.submit(ratios=[0.21], name="to be cancelled").json()["id"]
    page = visit("/")
    page.get_by_role("button", name=f"Cancel run {other}").click()
    expect(page.locator(f"tr[data-run='{other}'] .state")).to_have_text("cancelled")
    setting.cluster.gate.set()
    page = visit("/", allowed="422")
    page.get_by_label("Ratios").fill("7")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("alert")).to_contain_text("less than 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_run(visit: Open, setting: Setting, scheme: str) -> None:
    page = visit("/runs/1", scheme)
    assert page.locator("h1").inner_text() == f"Run 1: {HOSTILE}"
    traces = {picture: drawn(page, picture) for picture in PICTURES}
    assert [trace["name"] for trace in traces["distance"]] == ["independent", "greedy", "branch-and-bound"]
    assert len(traces["map"][0]["z"]) == 3
    assert {sum(row) for row in traces["kept"][0]["z"]} == {26}
    records = setting.http.get("/api/runs/1/records?ratio=0.6&limit=100").json()["records"]
    rows = page.locator("#records tbody tr")
    assert rows.count() == len(records) == 36
    assert page.locator("#records tbody tr td:nth-child(1)").all_inner_texts() == [r["problem"] for r in records]
    expect(page.locator("#masks a")).to_have_count(12)
    got = page.request.get(setting.url + str(page.locator("#masks a").first.get_attribute("href")))
    assert got.json()["format"] == "kv-channel-mask"
    page.locator("#set").select_option("1")
    assert {sum(row) for row in drawn(page, "kept")[0]["z"]} == {39}
    header = page.locator("#summary th:nth-child(3)")
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert page.locator("#summary tbody tr td:first-child").first.inner_text() == "branch-and-bound"


def test_a_head(visit: Open, setting: Setting) -> None:
    page = visit("/runs/1")
    page.wait_for_selector("#records tbody tr")
    page.locator("#records a", has_text=HEAD).first.click()
    page.wait_for_url(f"**/runs/1/heads/{HEAD}?ratio=0.6")
    names = [trace["name"] for trace in drawn(page, "graph")]
    assert {"kept (26)", "pruned (38)"} <= set(names)
    incumbents = {trace["name"]: trace for trace in drawn(page, "incumbent")}
    query = f"problem={HEAD}&ratio=0.6&solver=branch-and-bound"
    (record,) = setting.http.get(f"/api/runs/1/records?{query}").json()["records"]
    incumbent = incumbents["branch-and-bound, incumbent"]["y"]
    bound = incumbents["branch-and-bound, lower bound"]["y"]
    assert incumbent[-1] == pytest.approx(record["objective"], rel=1e-5)
    assert incumbent == sorted(incumbent, reverse=True)
    assert bound == sorted(bound)
    assert len(drawn(page, "time")) >= 1
    page.locator("#graph-solver").select_option("independent")
    expect(page.locator("#records tbody tr")).to_have_count(3)
    page.get_by_role("link", name="ratio 0.4").click()
    expect(page.locator("h1")).to_have_text(f"{HEAD}, ratio 0.4")
    assert "pruned (25)" in [trace["name"] for trace in drawn(page, "graph")]


def test_runs_side_by_side(visit: Open, setting: Setting) -> None:
    page = visit("/compare")
    page.locator("input[value='1']").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least two runs.")
    page.locator("input[value='2']").check()
    page.get_by_role("button", name="Compare").click()
    (channels,) = drawn(page, "channels")
    assert len(channels["z"]) == 12
    sides = []
    for side in ("left", "right"):
        run, ratio, solver = page.locator(f"#{side}").input_value().split(":")
        found = setting.http.get(f"/api/runs/{run}/records?ratio={ratio}&solver={solver}").json()["records"]
        sides.append({record["problem"]: set(record["pruned"]) for record in found})
    left, right = sides
    assert left != right
    for head, row in zip(channels["y"], channels["z"], strict=True):
        expected = [(i not in left[head]) + 2 * (i not in right[head]) for i in range(len(row))]
        assert row == expected
    rows = page.locator("#summary tbody tr")
    assert rows.count() == 7
    expect(page.locator("#differences tbody tr")).to_have_count(12)
    page.locator("#left").select_option(page.locator("#right").input_value())
    expect(page.locator("#overlap")).to_have_text("12 of 12 heads keep the same channels in both.")


def test_solvers_and_pages_that_are_not_there(visit: Open, setting: Setting) -> None:
    page = visit("/solvers")
    assert "branch-and-bound" in page.locator("#solvers tbody th").all_inner_texts()
    for path in ("/runs/99", f"/runs/1/heads/{HEAD}?ratio=0.123", "/runs/1/heads/none", "/nothing"):
        page = visit(path, allowed="404")
        assert page.locator("h1").inner_text() == "That did not work"
        assert page.get_by_role("alert").inner_text()
    assert setting.http.get("/runs/99", headers={"Accept": "text/html"}).status_code == 404


def test_the_keyboard_reaches_everything(visit: Open) -> None:
    page = visit("/runs/1")
    drawn(page, "time")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#content")
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input:not([type=hidden]), select, progress, .plot')]"
        ".filter(e => !e.closest('label') && !e.getAttribute('aria-label') && !e.closest('.plotly'))"
        ".map(e => e.outerHTML)"
    )
    assert unlabelled == []
    headings = page.locator("h1, h2").all_inner_texts()
    assert len(headings) == len(set(headings)) >= 8


def test_a_key_is_asked_for_and_kept(browser: Browser, tmp_path: Path) -> None:
    with Setting(tmp_path, None, keys_required=True) as locked:
        key = new_key()
        locked.storage.keys.add("ada", key, "read")
        context = context_of(browser)
        page = context.new_page()
        page.goto(f"{locked.url}/solvers")
        assert page.url == f"{locked.url}/login?next=/solvers"
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("not known")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/solvers")
        (cookie,) = context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
        page.goto(f"{locked.url}/")
        assert page.locator("#new-run").count() == 0  # this key may only read
        page.get_by_role("button", name="Log out").click()
        assert context.cookies() == []
        page.goto(f"{locked.url}/login?next=//elsewhere.example/")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{locked.url}/")
        context.close()


def test_four_hundred_heads_by_eight_solvers(visit: Open, setting: Setting) -> None:
    """As big as runs get: small enough to be sent, and drawn."""
    bodies = setting.http.get("/api/runs/1/records?ratio=0.6&limit=36").json()["records"]
    rng = np.random.default_rng(0)
    records = []
    for index in range(400):
        for solver in range(8):
            record = dict(bodies[int(rng.integers(36))])
            name = f"layers.{index // 8}.kv_heads.{index % 8}.key"
            pruned = sorted(rng.choice(128, 64, replace=False).tolist())
            records.append(
                {**record, "problem": name, "solver": f"solver-{solver}", "n": 128, "prune": 64, "pruned": pruned}
            )
    request = {
        "bundle": DIGEST,
        "solvers": [],
        "ratios": [0.6],
        "limits": {},
        "method": "grace-opt",
        "method_options": {},
        "value_ratio": None,
        "budget_bytes": [],
        "config": {"protect": True},
        "name": "big",
    }
    setting.service.runner.stop()
    run = setting.storage.runs.submit(request, len(records), 10**6, None, None)[0]["id"]
    setting.storage.runs.move(run, State.RUNNING)
    setting.storage.records.add(run, records)
    setting.storage.runs.finish(run, records, [], [])
    payload = setting.http.get(f"/runs/{run}/report.json").content
    assert len(payload) < 1_500_000
    assert len(json.loads(payload)["sets"][0]["rows"]) == 3200
    page = visit(f"/runs/{run}")
    assert len(drawn(page, "kept")[0]["z"]) == 400
    expect(page.locator("#records tbody tr")).to_have_count(50)
    page.locator("#kept-solver").select_option("5")
    assert len(drawn(page, "kept")[0]["z"][0]) == 128
