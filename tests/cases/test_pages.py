"""Pages with more than what was tried: many tabs, narrow screens, long names, odd numbers, wrong words in the form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from grace_opt.reports import evaluation, figures
from tests.reports.test_score_figures import grid
from tests.support.browser import chromium, context_of
from tests.support.setting import Setting

HEAD = "/runs/1/heads/layers.8.kv_heads.1.key?ratio=0.6"
LONG = "x" * 200
ODD = "\N{SNAKE} \u05e9\u05dc\u05d5\u05dd <b>bold</b> " + "\N{SNAKE}" * 150


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A service with two complete runs of odd names."""
    with Setting(tmp_path_factory.mktemp("pages"), None) as found:
        found.upload(name=LONG)
        solvers = [{"solver": name} for name in ("independent", "greedy", "branch-and-bound")]
        found.wait(found.submit(solvers=solvers, ratios=[0.6, 0.4], name=LONG).json()["id"])
        found.wait(found.submit(solvers=solvers[1:2], ratios=[0.6], name=ODD[:200]).json()["id"])
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = context_of(browser, viewport={"width": 1440, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def test_nine_tabs_watch_a_run(browser: Browser, setting: Setting) -> None:
    setting.cluster.gate.clear()
    run = setting.submit(ratios=[0.25]).json()["id"]
    context = context_of(browser)
    tabs = [context.new_page() for _ in range(8)]
    for tab in tabs:  # each is answered, however many there are
        tab.goto(f"{setting.url}/runs/{run}")
        expect(tab.locator("#state")).to_have_text("running")
    listed = context.new_page()
    listed.goto(setting.url)
    expect(listed.locator(f"tr[data-run='{run}'] .count")).to_have_text("0 of 12")
    setting.cluster.gate.set()
    for tab in tabs:
        expect(tab.locator("#state")).to_have_text("complete")
    expect(listed.locator(f"tr[data-run='{run}'] .state")).to_have_text("complete")
    context.close()


def test_a_page_goes_on_after_trouble(page: Page, setting: Setting) -> None:
    setting.cluster.gate.clear()
    run = setting.submit(ratios=[0.7]).json()["id"]
    page.goto(f"{setting.url}/runs/{run}")
    page.route(f"**/api/runs/{run}", lambda route: route.fulfill(status=502, body="<html>Bad Gateway</html>"))
    expect(page.get_by_role("alert")).to_contain_text("something else answered, with 502; trying again")
    page.unroute(f"**/api/runs/{run}")
    setting.cluster.gate.set()
    expect(page.locator("#state")).to_have_text("complete")


WRONG = [
    ({"Ratios": "0.5,,0.6"}, "Ratios", "A number is missing before or after a comma"),
    ({"Ratios": "0.5, 0.6,"}, "Ratios", "A number is missing before or after a comma"),
    ({"Ratios": "7"}, "Ratios", "at least 0 and less than 1, not 7."),
    ({"Ratios": "0x1"}, "Ratios", "not 0x1."),
    ({"Ratios": "Infinity"}, "Ratios", "not Infinity."),
    ({"Ratios": " "}, "Ratios", "Give at least one ratio, or bytes."),
    ({"Bytes of an old token": "-1"}, "Bytes of an old token", "a number above 0, not -1."),
    ({"Seconds for each head": "soon"}, "Seconds for each head", "Seconds must be from 0 to 1000000, not soon."),
    ({"Seconds for each head": "1,2"}, "Seconds for each head", "Give one number of seconds"),
    ({"Ratios": "", "Bytes of an old token": "1"}, None, "take at least"),  # what only the service knows
]


@pytest.mark.parametrize(("fields", "label", "said"), WRONG)
def test_what_is_wrong_is_said_beside_the_field(
    page: Page, setting: Setting, fields: dict[str, str], label: str | None, said: str
) -> None:
    runs = setting.http.get("/api/runs").json()["total"]
    page.set_viewport_size({"width": 390, "height": 500})  # where the form does not fit
    page.goto(setting.url)
    for name, value in fields.items():
        page.get_by_label(name).fill(value)
    page.get_by_role("button", name="Submit").click()
    alert = page.locator("#new-run").get_by_role("alert")
    expect(alert).to_contain_text(said)
    assert "Input should" not in alert.inner_text()
    expect(alert).to_be_in_viewport()
    if label is not None:
        field = page.get_by_label(label)
        expect(field).to_be_focused()
        expect(field).to_be_in_viewport()
        boxes = alert.bounding_box(), field.bounding_box()
        assert boxes[0] is not None
        assert boxes[1] is not None
        assert 0 <= boxes[0]["y"] - boxes[1]["y"] < 80
        assert field.get_attribute("aria-invalid") == "true"
        assert field.get_attribute("aria-describedby") == alert.get_attribute("id")
        field.fill("0.5" if label == "Ratios" else "1e9")
    assert setting.http.get("/api/runs").json()["total"] == runs


def test_a_form_without_solvers_and_several_faults(page: Page, setting: Setting) -> None:
    page.goto(setting.url)
    for solver in ("greedy", "branch-and-bound"):
        page.locator(f"#new-run input[value={solver}]").uncheck()
    page.get_by_label("Ratios").fill("a")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#error-solver")).to_have_text("Choose at least one solver.")
    expect(page.locator("#error-ratios")).to_contain_text("not a.")
    expect(page.locator("#new-run input[name=solver]").first).to_be_focused()
    page.locator("#new-run input[name=solver][value=greedy]").check()
    page.get_by_label("Ratios").fill("0.35 , .36")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/*")
    run = page.url.rpartition("/")[2]
    assert setting.http.get(f"/api/runs/{run}").json()["request"]["ratios"] == [0.35, 0.36]


PAGES = (
    "/",
    "/?state=failed",
    "/runs/1",
    "/runs/2",
    HEAD,
    "/compare",
    "/compare?run=1&run=2",
    "/solvers",
    "/login",
    "/x",
)


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_page_is_wider_than_the_screen(page: Page, setting: Setting, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for path in PAGES:
        page.goto(setting.url + path)
        if path.startswith("/runs"):
            page.wait_for_selector("#records tbody tr", state="attached")
        if "run=1" in path:
            page.wait_for_selector("#differences tbody tr", state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        if width == 1440:  # and no table is cut
            tables = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
            assert all(more <= 0 for more in tables), path
        cut = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .plot, select, .hidden'))"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
        )
        assert cut == [], path


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_of_an_evaluation_is_not_either(page: Page, tmp_path: Path, width: int) -> None:
    evaluation.write(grid(task="ruler/niah_multikey_1"), tmp_path, {"command": "grace-opt evaluate " + "x" * 300})
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("img").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_times_say_their_zone_and_counts_what_they_count(page: Page, setting: Setting) -> None:
    run = setting.http.get("/api/runs/1").json()
    page.goto(setting.url)
    row = page.locator("tr[data-run='1']")
    times = row.locator("time")
    assert times.count() == 2
    for time in times.all():
        assert time.inner_text().replace("\xa0", " ").endswith(" UTC")
    assert times.first.get_attribute("datetime") == run["created"]
    assert row.locator(".count").inner_text() == "72 of 72"  # 12 heads, two budgets, three solvers
    assert "Heads done" not in page.content()
    page.goto(setting.url + "/runs/1")
    assert "72 of 72 records" in page.locator("#about").inner_text()
    assert page.locator("#about time").first.inner_text().endswith("UTC")


SCALES = [
    *((34109000.0, 40.0), (-34109000.0, 0.5), (5e12, 30.0), (0.0, 1e-13), (1e200, 3e199), (-7.0, 0.0), (123000.0, 1.0)),
]


@pytest.mark.parametrize(("offset", "spread"), SCALES)
def test_ticks_tell_one_from_the_next(page: Page, setting: Setting, offset: float, spread: float) -> None:
    page.goto(setting.url + HEAD)
    page.wait_for_selector("#incumbent .main-svg", state="attached")
    ticks = page.evaluate(
        """([offset, spread]) => {
          for (const detail of Object.values(Object.values(data.sets[0].details)[0])) {
            detail.trace.forEach((step, i, all) => {
              step[3] = offset + spread * (all.length - i) / all.length;
              step[4] = i % 2 ? null : offset - spread * (all.length - i) / all.length;
            });
          }
          drawIncumbent();
          return [...document.querySelectorAll("#incumbent .ytick text")].map((text) => text.textContent);
        }""",
        [offset, spread],
    )
    assert len(ticks) >= 2
    assert len(set(ticks)) == len(ticks), ticks


def test_numbers_in_tables(page: Page, setting: Setting) -> None:
    page.goto(setting.url + HEAD)
    page.wait_for_selector("#records tbody tr", state="attached")
    cases = {
        "number(123000)": "123000",
        "number(100000)": "100000",
        "number(0)": "0",
        "number(-0.00012345678)": "-0.000123457",
        "number(null)": "\u2013",
        "number(1e-30)": "1e-30",
        "number(3.5e200)": "3.5e+200",
        "precise(34109123.4567)": "34109123.46",
        "precise(-1.5)": "-1.5",
        "precise(9e11)": "9e+11",
    }
    assert {code: page.evaluate(code) for code in cases} == cases


def test_a_page_can_be_printed_and_read_without_colour(page: Page, setting: Setting) -> None:
    page.goto(setting.url + "/runs/1")
    page.wait_for_selector("#records tbody tr", state="attached")
    page.emulate_media(media="print")
    assert not page.locator("header").is_visible()
    assert page.locator("#records").is_visible()


def evaluated(kl: float) -> dict[str, Any]:
    return {
        "method": "grace",
        "ratio": 0.5,
        "value_ratio": 0.0,
        "kl": {"mean": kl, "low": None, "high": None},
        "bytes_per_token": 750.0,
        "full_bytes_per_token": 1000.0,
        "kl_positions": [],
        "kept": {"key": None, "value": None},
    }


@pytest.mark.parametrize(
    ("low", "high"), [(34109000.0, 34109040.0), (1e-9, 1.0001e-9), (0.5, 0.5), (1e7, 1.2e7), (0.123456, 0.1234561)]
)
def test_ticks_of_figures_tell_one_from_the_next(low: float, high: float, tmp_path: Path) -> None:
    figures.pareto([evaluated(low), evaluated(high)], tmp_path / "p.png")
    figure = figures._pareto([evaluated(low), evaluated(high)])
    figure.draw_without_rendering()
    bottom, top = figure.axes[0].get_ylim()
    ticks = figure.axes[0].yaxis.get_major_ticks()
    shown = [tick.label1.get_text() for tick in ticks if bottom <= tick.get_loc() <= top]
    assert len(shown) >= 2
    assert len(set(shown)) == len(shown), shown
