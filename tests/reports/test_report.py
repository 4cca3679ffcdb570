"""report.html in a real browser: no error, no network, every picture drawn, tables that sort, menus that act.

Chromium is Debian's, driven by Playwright; GRACE_OPT_CHROMIUM names another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from grace_opt import GraphBundle, HeadGraph, load_bundle, save_bundle
from grace_opt.compare import Comparison, compare
from grace_opt.compression.method import method
from grace_opt.reports.report import SHOWN_HEADS, channel_graph, report_data
from tests.support import DATA
from tests.support.browser import chromium, context_of

SOLVERS = ("independent", "greedy", "branch-and-bound")
MODEL = "</script><b>a model</b> & more"
PICTURES = ("distance", "profile", "map", "kept", "time", "incumbent", "graph")


UNIFORM = method("grace-opt", {"budget": "uniform", "protection": "default"})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A real comparison: heads of SmolLM2, some of their channels protected, at two ratios."""
    folder = tmp_path_factory.mktemp("report")
    heads = tuple(
        HeadGraph(head.layer, head.kv_head, head.kind, head.weights, protected=np.arange(64) % 16 == 3)
        for head in load_bundle(DATA / "heads-smollm2-135m.safetensors").heads
    )
    bundle = folder / "a bundle's <graphs>.safetensors"
    save_bundle(GraphBundle(heads, {"model": MODEL}), bundle)
    command = ["grace-opt", "compare", str(bundle), "-o", "a folder"]
    solvers = {name: {} for name in SOLVERS}
    about = {"method": UNIFORM, "provenance": {"command": command}}
    done = compare([bundle], solvers, [0.6, 0.3], folder / "r", **about)
    return done, folder / "r" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, compared: tuple[Comparison, Path], request: pytest.FixtureRequest) -> Iterator[Page]:
    """The report, opened from the disk; at the end nothing may have gone wrong or been fetched."""
    wrong: list[str] = []
    address = compared[1].resolve().as_uri()
    scheme = getattr(request, "param", "light")
    context = context_of(browser, viewport={"width": 1400, "height": 1000}, color_scheme=scheme, offline=True)
    opened = context.new_page()
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request", lambda r: None if r.url == address or r.url.startswith(("data:", "blob:")) else wrong.append(r.url)
    )
    opened.goto(address)
    yield opened
    context.close()
    assert wrong == []


def drawn(page: Page, picture: str) -> str:
    """What a picture shows, with its axes."""
    found: str = page.evaluate(
        "id => { const g = document.getElementById(id);"
        " return JSON.stringify([g.data, g.layout.xaxis, g.layout.yaxis, g.layout.annotations])"
        " + g.querySelector('.main-svg').innerHTML; }",
        picture,
    )
    return found


def column(page: Page, table: str, number: int) -> list[str]:
    return page.locator(f"#{table} tbody tr td:nth-child({number})").all_inner_texts()


def figures(texts: list[str]) -> list[float]:
    return [float(text.removesuffix(" %")) for text in texts if text != "\u2013"]


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_every_picture_is_drawn(page: Page, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for picture in PICTURES:
        box = page.locator(f"#{picture} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 600
        assert box["height"] > 200
        assert page.locator(f"#{picture} .annotation").count() == 0  # nothing says that there is nothing to see
    kept = page.evaluate("() => document.getElementById('kept').data[0].z")
    assert (len(kept), {sum(row) for row in kept}) == (12, {26})
    for picture in ("distance", "profile", "time"):
        paths = page.locator(f"#{picture} .scatterlayer .trace path.js-line")
        assert paths.count() >= (1 if picture == "time" else len(SOLVERS))
    image = page.locator("#map .heatmaplayer image").first.bounding_box()
    assert image is not None
    assert image["width"] > 500
    expect(page.locator("#graph .scatterlayer .points path.point")).to_have_count(64)
    names = page.locator("#graph .legendtext").all_text_contents()
    assert {"kept (22)", "pruned (38)", "protected (4)"} <= set(names)
    background, text = page.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('#distance .xtitle')).fill]"
    )
    dark = request.node.callspec.params["page"] == "dark"
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    assert (sum(map(int, text[4:-1].split(","))) > 500) == dark
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_axes_and_pictures_say_what_they_are(page: Page) -> None:
    titles = {p: page.locator(f"#{p} .xtitle, #{p} .ytitle").all_text_contents() for p in PICTURES}
    assert titles["distance"] == ["Distance to the best known objective (%)", "Share of heads"]
    assert titles["map"] == ["Layer", "KV head"]
    assert "(ms)" in titles["time"][0]
    assert "(%)" in titles["time"][1]
    for picture in PICTURES:
        assert len(page.locator(f"#{picture}").get_attribute("aria-label") or "") > 30
        assert page.locator(f"figure:has(#{picture}) figcaption").inner_text()
    assert "Dolan and Mor\u00e9" in page.locator("figure:has(#profile) figcaption").inner_text()
    assert "infinity" in page.locator("figure:has(#profile) figcaption").inner_text()


def test_the_header_says_how_to_make_it_again(page: Page, compared: tuple[Comparison, Path]) -> None:
    run = compared[0].run
    facts = page.locator("#facts").inner_text()
    assert MODEL in facts
    assert MODEL in page.locator("h1").inner_text()
    assert "12 at ratio 0.6 (38 of 64 channels pruned)" in facts
    assert "-o 'a folder'" in facts
    for said in (run["started"], run["versions"]["numpy"], "greedy: direction forward", "gap_rel"):
        assert said in facts
    assert page.locator("#facts b").count() == 0  # the bundle's words are text, not markup


def test_a_click_sorts(page: Page) -> None:
    for table, number in (("summary", 3), ("records", 5)):
        header = page.locator(f"#{table} th:nth-child({number})")
        assert header.get_attribute("aria-sort") == "none"
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == "ascending"
        rising = column(page, table, number)
        header.locator("button").focus()
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "descending"
        falling = column(page, table, number)
        assert figures(rising) == sorted(figures(rising))
        assert figures(falling) == sorted(figures(falling), reverse=True)
        assert rising != falling
        expect(page.locator(f"#{table} th[aria-sort=ascending], #{table} th[aria-sort=descending]")).to_have_count(1)
    page.locator("#records th:nth-child(2) button").click()
    assert column(page, "records", 2) == sorted(column(page, "records", 2))
    for _ in range(2):  # independent and greedy prove nothing: missing values stay last
        page.locator("#summary th:nth-child(5) button").click()
        assert [text == "\u2013" for text in column(page, "summary", 5)] == [False, True, True]


def test_the_records_are_those_of_the_comparison(page: Page, compared: tuple[Comparison, Path]) -> None:
    records = [r for r in compared[0].records if r["ratio"] == 0.6]
    assert len(records) == 36
    assert column(page, "records", 1) == [r["problem"] for r in records]
    assert column(page, "records", 2) == [r["solver"] for r in records]
    shown = figures(column(page, "records", 5))
    assert shown == pytest.approx([r["objective"] for r in records], rel=1e-5)
    over = [100 * r["over_best"] for r in records]
    assert figures(column(page, "records", 9)) == pytest.approx(over, rel=1e-3, abs=1e-9)


def test_no_table_is_cut(page: Page) -> None:
    for width in (1440, 768, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        more = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
        assert width < 1440 or more == [0, 0]


def test_menus_change_the_picture(page: Page) -> None:
    menus = {
        "distance-from": "distance",
        "criterion": "profile",
        "map-solver": "map",
        "map-value": "map",
        "kept-solver": "kept",
        "incumbent-head": "incumbent",
        "time-head": "time",
        "time-value": "time",
        "graph-head": "graph",
        "graph-solver": "graph",
    }
    for menu, picture in menus.items():
        select = page.locator(f"#{menu}")
        values: list[str] = select.locator("option").evaluate_all("options => options.map(option => option.value)")
        before = select.input_value()
        seen = {drawn(page, picture)}
        for value in values[:4]:
            select.select_option(value)
            seen.add(drawn(page, picture))
        assert len(seen) > 1, menu  # two solvers may agree on one head, but not all choices on everything
        select.select_option(before)


def test_another_ratio_changes_everything(page: Page) -> None:
    pictures = [drawn(page, picture) for picture in PICTURES]
    tables = [page.locator(f"#{table} tbody").inner_text() for table in ("summary", "records")]
    page.locator("#set").select_option("1")
    for before, picture in zip(pictures, PICTURES, strict=True):
        assert drawn(page, picture) != before, picture
    for before, table in zip(tables, ("summary", "records"), strict=True):
        assert page.locator(f"#{table} tbody").inner_text() != before, table
    assert "pruned (19)" in page.locator("#graph .legendtext").all_text_contents()


def test_the_scheme_can_change_while_it_is_open(page: Page) -> None:
    before = page.locator("#distance .xtitle").evaluate("title => getComputedStyle(title).fill")
    page.emulate_media(color_scheme="dark")
    assert page.locator("#distance .xtitle").evaluate("title => getComputedStyle(title).fill") != before


def test_it_stays_small_with_many_heads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heads = []
    for layer in range(32):
        for kv_head in range(8):
            q = rng.normal(size=(12, 12))
            heads.append(HeadGraph(layer, kv_head, "key", q.T @ q))
    save_bundle(GraphBundle(tuple(heads), {}), tmp_path / "many.safetensors")
    done = compare(
        [tmp_path / "many.safetensors"], {"independent": {}, "greedy": {}}, [0.5], tmp_path / "r", method=UNIFORM
    )
    data = report_data(done.records, done.summary, _problems(tmp_path / "many.safetensors"), done.run)
    (shown,) = data["graphs"].values()
    assert len(shown) <= SHOWN_HEADS
    assert "layers.0.kv_heads.0.key" in shown
    worst = max(done.records, key=lambda record: record["over_best"])
    assert worst["problem"] in shown
    assert len(data["sets"][0]["rows"]) == 512


def _problems(path: Path) -> dict[tuple[str, str], Any]:
    return {(str(path), problem.name): problem for problem in load_bundle(path).problems(0.5)}


def test_channel_graphs_are_the_same_each_time() -> None:
    problem = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.5)[0]
    graph = channel_graph(problem)
    assert graph == channel_graph(problem)
    assert len(graph["x"]) == len(graph["y"]) == len(graph["own"]) == 64
    scale = np.sqrt(np.diagonal(problem.weights))
    strength = np.abs(problem.weights / np.outer(scale, scale)) - 2 * np.eye(64)
    edges = {tuple(graph["edges"][k : k + 2]) for k in range(0, len(graph["edges"]), 3)}
    expected = {tuple(sorted((i, int(j)))) for i in range(64) for j in np.argsort(-strength[i])[:3]}
    assert edges == expected
