"""Nothing leaves the machine: no page, report, script of ours or file of the documentation refers to another host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from grace_opt.compare import compare
from grace_opt.compression.method import method
from tests.support import ROOT
from tests.support.browser import chromium, context_of
from tests.support.setting import HEADS, Setting

#: In plotly.js, but not behind anything that is drawn here: licences and sources in comments, tiles and fonts of maps,
#: words to users without WebGL, and the cloud whose button is off in every picture. A new one is a reason to
#: look at what it does there.
IN_PLOTLY = {
    *("feross.org", "getify.mit-license.org", "syntheti.cc", "github.com", "plotly.com", "maplibre.org"),  # comments
    *("basemaps.cartocdn.com", "tiles.basemaps.cartocdn.com", "fonts.openmaptiles.org", "server.arcgisonline.com"),
    *("geoserveis.icgc.cat", "tilemaps.icgc.cat", "tile.openstreetmap.org", "www.openstreetmap.org", "www.esri.com"),
    *("cdn.jsdelivr.net", "cdn.plot.ly"),  # MathJax and outlines of countries, where a page has them
    *("get.webgl.org", "wiki.openstreetmap.org"),
    "cloud.plotly.com",
}
URL = re.compile(r"""(?<![\w.])(?:https?:|wss?:|ftp:)?//([a-z0-9-]+(?:\.[a-z0-9-]+)+)(?=[/:"'\s)<>]|$)""", re.I)
NAMES = "src|href|action|formaction|poster|srcset|data|cite|manifest|xlink:href"
ATTRIBUTE = re.compile(rf"""\b(?:{NAMES})\s*=\s*["']?([^"'\s>]+)""", re.I)
STYLE = re.compile(r"""url\(\s*["']?(?!data:)([^"')]+)|@import\s+["']([^"']+)""", re.I)


def others(text: str) -> set[str]:
    """Hosts that a text refers to, apart from names of XML and this machine."""
    return {host.lower() for host in URL.findall(text)} - {"www.w3.org", "127.0.0.1"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A service with two complete runs."""
    with Setting(tmp_path_factory.mktemp("leaves"), None) as found:
        found.upload(name="heads")
        for ratio in (0.5, 0.6):
            found.wait(found.submit(ratios=[ratio]).json()["id"])
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    uniform = method("grace-opt", {"budget": "uniform"})
    compare([HEADS], {"independent": {}, "greedy": {}}, [0.5], folder / "r", method=uniform)
    return folder / "r" / "report.html"


PAGES = (
    *("/", "/login", "/solvers", "/compare", "/compare?run=1&run=2", "/runs/1", "/runs/99"),
    "/runs/1/heads/layers.8.kv_heads.1.key?ratio=0.5",
)


def test_no_page_refers_to_another_host(setting: Setting, report: Path) -> None:
    texts = {path: setting.http.get(path, headers={"Accept": "text/html"}).text for path in PAGES}
    texts["report.html"] = re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", report.read_text(), flags=re.S)
    assert len(texts["report.html"]) < 400_000  # the script of plotly.js is not in what is looked at here
    for path, text in texts.items():
        assert others(text) == set(), path
        markup = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.S)
        for target in ATTRIBUTE.findall(markup):
            assert target.startswith(("/", "#", "?", "data:")), (path, target)
            assert not target.startswith("//"), (path, target)


def test_no_script_or_style_of_ours_refers_to_another_host() -> None:
    folders = (ROOT / "grace_opt" / "reports" / "assets", ROOT / "grace_opt" / "service" / "http")
    files = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in (".js", ".css", ".html")
    ]
    assert len(files) > 10
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert others(text) == set(), path
        assert STYLE.findall(text) == [], path


def test_the_documentation_loads_nothing_from_another_host() -> None:
    """Links lead elsewhere, for a reader to follow; pictures, styles and scripts are here."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r"!\[[^\]]*\]\(\s*(?:https?:)?//", text), path
        assert not re.findall(r"""<(?:img|script|link|iframe|video|source)\b[^>]*(?:https?:)?//""", text), path
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in config
    assert others(config) == set()
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".css", ".js", ".html", ".svg"):
            assert others(path.read_text(encoding="utf-8")) == set(), path


def test_what_plotly_refers_to_is_known() -> None:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    text = get_plotlyjs()
    assert others(text) - IN_PLOTLY == set()


def test_pictures_have_no_way_to_a_cloud(browser: Browser, setting: Setting, report: Path) -> None:
    context = context_of(browser)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    pictures = 0
    for address in (report.as_uri(), *(setting.url + path for path in PAGES)):
        page.goto(address)
        if page.locator(".plot").count() == 0:
            continue
        page.wait_for_selector(".plot .modebar", state="attached")
        found: list[dict[str, Any]] = page.evaluate(
            "() => [...document.querySelectorAll('.plot')].filter(p => p._context).map(p => ({"
            "server: p._context.plotlyServerURL, send: [p._context.showSendToCloud, p._context.showEditInChartStudio,"
            " p._context.showLink, p._context.sendData, p._context.displaylogo],"
            "buttons: [...p.querySelectorAll('.modebar-btn')].map(b => b.dataset.title || ''),"
            "links: [...p.querySelectorAll('a[href]')].map(a => a.href)}))"
        )
        pictures += len(found)
        for picture in found:
            assert picture["server"] == ""
            assert not any(picture["send"])
            assert picture["links"] == []
            assert picture["buttons"]
            assert not [b for b in picture["buttons"] if re.search(r"cloud|studio|edit|share|send|plotly", b, re.I)]
    assert pictures >= 15
    own = (setting.url, report.as_uri(), "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
    context.close()


def test_a_report_cannot_be_made_to_send(browser: Browser, report: Path) -> None:
    """Were there a button after all, the page's own policy stops it."""
    ways = {
        "img-src": "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/'}))",
        "connect-src": "fetch('http://127.0.0.1:9/').catch(() => 0)",
        "form-action": "f = document.body.appendChild(document.createElement('form')); f.action = 'http://127.0.0.1:9/';"
        " f.submit()",
    }
    context = context_of(browser)
    page = context.new_page()
    finished: list[str] = []
    page.on("requestfinished", lambda request: finished.append(request.url))
    page.goto(report.as_uri())
    page.evaluate(
        "() => { window.refused = []; document.onsecuritypolicyviolation = e => refused.push(e.effectiveDirective); }"
    )
    for directive, code in ways.items():
        page.evaluate(f"() => {{ let f; {code} }}")
        page.wait_for_function("directive => refused.includes(directive)", arg=directive)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in finished)
    context.close()
