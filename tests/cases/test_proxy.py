"""A service behind a reverse proxy: what users see is not what the server listens at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect
from starlette.requests import Request
from starlette.testclient import TestClient

from grace_opt.errors import InputError
from grace_opt.service.client import Client
from grace_opt.service.http import app as app_module
from grace_opt.service.http.access import COOKIE, new_key
from grace_opt.service.http.site import Site, site_of
from tests.support import ROOT
from tests.support.browser import chromium, context_of
from tests.support.proxy import nginx
from tests.support.serving import free_port
from tests.support.setting import Setting

NAME = "solver.example.com"
DOCUMENTED = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "service.md").read_text(encoding="utf-8"), re.DOTALL)
KEPT = "location / { proxy_pass http://127.0.0.1:8080; proxy_set_header Host $http_host; }"
REWRITTEN = "location / { proxy_pass http://127.0.0.1:8080; }"
STRIPPED = "location /a/b/ { proxy_pass http://127.0.0.1:8080/; proxy_set_header Host $host; }"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(f"--host-resolver-rules=MAP {NAME} 127.0.0.1") as found:
        yield found


@contextmanager
def behind(folder: Path, locations: str, root: str = "", tls: bool = False) -> Iterator[tuple[Setting, str, str]]:
    """A service that needs keys, the URL that users type, and a key that may submit."""
    port = free_port()
    public = f"{'https' if tls else 'http'}://{NAME}:{port}{root}"
    site, reason = site_of("127.0.0.1", public)
    assert reason is not None  # what has a public name needs keys
    with Setting(folder, None, site, keys_required=True) as setting:
        key = new_key()
        setting.storage.keys.add("ada", key, "submit")
        inner = setting.url.removeprefix("http://")
        with nginx(folder / "nginx", port, locations.replace("127.0.0.1:8080", inner), name=NAME, tls=tls):
            yield setting, public, key


@pytest.mark.parametrize(
    ("locations", "root", "tls"),
    [
        (KEPT, "", False),
        (REWRITTEN, "", True),
        (STRIPPED, "/a/b", False),
        (DOCUMENTED and DOCUMENTED[1], "/grace", True),
    ],
    ids=["host-kept", "host-rewritten", "path-taken-away", "documented"],
)
def test_somebody_logs_in_submits_and_watches(
    browser: Browser, tmp_path: Path, locations: str, root: str, tls: bool
) -> None:
    with behind(tmp_path, locations, root, tls) as (setting, public, key):
        setting.http.headers["Authorization"] = f"Bearer {key}"
        assert setting.upload(name="heads").status_code == 201
        setting.cluster.gate.clear()
        context = context_of(browser, ignore_https_errors=True)
        page = context.new_page()
        elsewhere: list[str] = []
        page.on("request", lambda r: None if r.url.startswith((public, "data:", "blob:")) else elsewhere.append(r.url))
        page.goto(f"{public}/?state=queued&limit=7")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{public}/?state=queued&limit=7")  # what was asked for, with its query
        (cookie,) = context.cookies()
        assert (cookie["name"], cookie["path"], cookie["secure"]) == (COOKIE, root or "/", tls)
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(f"{public}/runs/1")
        streamed = page.evaluate(
            "url => new Promise(done => { const s = new EventSource(url);"
            " s.addEventListener('progress', e => { s.close(); done(JSON.parse(e.data)); }); })",
            f"{public}/api/runs/1/events",
        )
        assert streamed["total"] == 24  # at once, while the run stands still
        setting.cluster.gate.set()
        expect(page.locator("#state")).to_have_text("complete")
        page.wait_for_selector("#records tbody a")
        page.locator("#records tbody a").first.click()
        page.wait_for_selector("#graph .main-svg", state="attached")
        page.get_by_role("link", name="Runs").click()
        page.wait_for_selector("#runs tbody tr")
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{public}/login")
        assert context.cookies() == []
        assert elsewhere == []
        context.close()
        if tls:
            return
        with Client(f"http://127.0.0.1:{public.split(':')[2]}", key) as client:  # a program, with any Host
            assert client.run(1).state == "complete"
            assert len(client.masks(1)) == 2


def test_links_redirects_and_the_document_are_below_the_root(tmp_path: Path) -> None:
    site = Site("https://solver.example.com", "/grace", None)
    with Setting(tmp_path, None, site, keys_required=True) as setting:
        key = new_key()
        setting.storage.keys.add("ada", key, "admin")
        for path in ("/runs", "/grace/runs"):  # a proxy passes the root on, or takes it away
            answer = setting.http.get(path + "/9?x=1&y=2", headers={"Accept": "text/html"})
            assert answer.headers["location"] == "/grace/login?next=/runs/9%3Fx%3D1%26y%3D2"
        form = {"key": key, "next": "/runs/9?x=1&y=2"}
        answer = setting.http.post("/grace/login", data=form, headers={"Origin": "https://solver.example.com"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/grace/runs/9?x=1&y=2")
        assert "Path=/grace; SameSite=strict; Secure" in answer.headers["set-cookie"]
        setting.http.headers["Authorization"] = f"Bearer {key}"
        assert setting.upload().status_code == 201
        assert setting.submit().headers["location"] == "/grace/api/runs/1"
        document = setting.http.get("/grace/api/openapi.json").json()
        assert document["servers"] == [{"url": "https://solver.example.com/grace"}]
        page = setting.http.get("/grace", headers={"Accept": "text/html"})  # and without the last slash
        assert page.status_code == 200
        for target in re.findall(r'(?:href|src|action)="([^"]+)"', page.text):
            assert target.startswith(("/grace/", "#", "data:")), target
        for target in re.findall(r'(?:href|src)="(/grace/static[^"]+)"', page.text):
            assert setting.http.get(target).status_code == 200
        assert setting.http.get("/graceful").status_code == 404


OTHERS = (
    *("//evil.example", "https://evil.example/", "/\\evil.example", "/\t/evil.example", "\\\\evil.example"),
    *("//", "x", "", "javascript:alert(1)", "/ok\r\nSet-Cookie: a=b", "/%0d%0a//evil.example", "///evil.example"),
    "/?next=//ok",
)


@pytest.mark.parametrize("target", OTHERS)
def test_a_login_leads_to_no_other_site(target: str, one: tuple[Setting, str]) -> None:
    setting, key = one
    answer = setting.http.post("/login", data={"key": key, "next": target})
    location = httpx.URL(setting.url).join(answer.headers["location"])
    assert answer.status_code == 303
    assert location.netloc == httpx.URL(setting.url).netloc
    assert answer.headers["location"] in ("/", target)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Setting, str]]:
    """A service that needs keys, with one that may do everything, a bundle and a run."""
    with Setting(tmp_path_factory.mktemp("one"), None, keys_required=True) as setting:
        key = new_key()
        setting.storage.keys.add("ada", key, "admin")
        auth = {"Authorization": f"Bearer {key}"}
        setting.http.headers.update(auth)
        setting.upload()
        setting.wait(setting.submit().json()["id"])
        yield setting, key


def test_head_is_answered_where_get_is(one: tuple[Setting, str]) -> None:
    setting, _ = one
    mask = setting.http.get("/api/runs/1/masks").json()[0]["digest"]
    known = {"run": "1", "digest": mask, "problem": "layers.8.kv_heads.1.key"}
    paths = [route.path for route in setting.app.routes if "GET" in (getattr(route, "methods", None) or ())]
    document = setting.http.get("/api/openapi.json").json()["paths"]
    paths += [path for path, operations in document.items() if "get" in operations]
    paths += ["/", "/login", "/runs/1", "/compare", "/solvers", "/static/site.css", "/static/plotly.min.js", "/nothing"]
    for path in dict.fromkeys(paths):
        address = re.sub(r"\{(\w+)(:\w+)?\}", lambda match: known[match[1]], path)
        if address.startswith("/api/bundles/"):
            address = "/api/bundles/" + setting.http.get("/api/bundles").json()["bundles"][0]["digest"]
        got, head = setting.http.get(address), setting.http.head(address)
        assert (head.status_code, head.content) == (got.status_code, b""), address
        assert head.headers.get("content-type") == got.headers.get("content-type"), address
        assert head.headers.get("content-length") == got.headers.get("content-length") or "metrics" in path, address
    refused = setting.http.head("/api/runs/1/cancel")
    assert refused.status_code == 405
    assert "HEAD" in setting.http.post("/api/meta").headers["allow"]
    setting.cluster.gate.clear()
    run = setting.submit(ratios=[0.3]).json()["id"]
    stream = setting.http.head(f"/api/runs/{run}/events")  # ends, though the stream would not
    assert (stream.status_code, stream.headers["x-accel-buffering"]) == (200, "no")
    setting.cluster.gate.set()


PUBLIC = Site("https://solver.example.com", "", None)
ORIGINS: list[tuple[dict[str, str], Site, int]] = [
    ({"Origin": "https://solver.example.com", "Host": "127.0.0.1:8080"}, Site("https://solver.example.com"), 422),
    ({"Origin": "https://solver.example.com", "Host": "solver.example.com"}, Site(None, "", None), 422),
    ({"Origin": "https://SOLVER.example.com:443", "Host": "solver.example.com"}, Site(None, "", None), 422),
    ({"Origin": "https://solver.example.com", "Host": "127.0.0.1", "Sec-Fetch-Site": "same-origin"}, Site(), 422),
    ({"Origin": "https://evil.example", "Host": "127.0.0.1", "Sec-Fetch-Site": "cross-site"}, Site(), 403),
    (
        {"Origin": "https://sub.example.com", "Host": "x.example.com", "Sec-Fetch-Site": "same-site"},
        Site(hosts=None),
        403,
    ),
    ({"Origin": "http://solver.example.com", "Host": "x"}, PUBLIC, 403),
    ({"Origin": "https://solver.example.com:8443", "Host": "x"}, PUBLIC, 403),
    (
        {"Origin": "https://solver.example.com.evil.example", "Host": "x"},
        PUBLIC,
        403,
    ),
    ({"Origin": "null", "Host": ""}, Site(None, "", None), 403),
    ({"Origin": "https://evil.example", "X-Forwarded-Host": "evil.example", "Host": "localhost"}, Site(), 403),
    ({"Host": "evil.example"}, Site(), 421),
    ({"Host": "Solver.Example.com.:80"}, site_of("127.0.0.1", None, ("solver.example.com",))[0], 422),
    ({"Host": "[::1]:8080"}, Site(), 422),
]


@pytest.mark.parametrize(("headers", "site", "status"), ORIGINS)
def test_whose_page_a_request_is_of(headers: dict[str, str], site: Site, status: int) -> None:
    app = app_module.create_app(_Nobody(), site)  # type: ignore[arg-type]
    answer = TestClient(app).post("/api/runs", json={}, headers=headers)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert "--public-url" in answer.json()["detail"]  # the cure


class _Nobody:
    """A service that lets everybody in, and does nothing."""

    class access:  # noqa: N801
        required = False

        @staticmethod
        async def caller(_: Request) -> Any:
            from grace_opt.service.http.access import Caller

            return Caller(None, "admin")

    class pages:  # noqa: N801
        @staticmethod
        def get(*_: str) -> None:
            return None


SITES: list[tuple[tuple[Any, ...], dict[str, Any], tuple[str | None, str], tuple[str, ...] | None]] = [
    (("127.0.0.1",), {}, (None, ""), ("127.0.0.1", "localhost", "::1")),
    (("127.0.0.1", "https://Solver.example.com:443/grace/"), {}, ("https://solver.example.com", "/grace"), None),
    (
        ("127.0.0.1", "http://127.0.0.1:9000/x/y"),
        {},
        ("http://127.0.0.1:9000", "/x/y"),
        ("127.0.0.1", "localhost", "::1"),
    ),
    (("0.0.0.0",), {}, (None, ""), None),
    (("127.0.0.1",), {"require_keys": True}, (None, ""), None),
    (("127.0.0.1", None, ("a.example",)), {}, (None, ""), ("127.0.0.1", "localhost", "::1", "a.example")),
    (("127.0.0.1", None, (), "grace"), {}, (None, "/grace"), ("127.0.0.1", "localhost", "::1")),
    (("127.0.0.1", "https://b\u00fccher.example"), {}, ("https://xn--bcher-kva.example", ""), None),
]


@pytest.mark.parametrize(("given", "more", "seen", "hosts"), SITES)
def test_what_users_see(given: Any, more: Any, seen: Any, hosts: Any) -> None:
    site, reason = site_of(*given, **more)
    assert (site.origin, site.root) == seen
    assert site.hosts == hosts
    named = given[0] == "0.0.0.0" or any("example" in str(each) for each in given)
    assert (reason is not None) == (named or "require_keys" in more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("127.0.0.1", "solver.example.com"), "public URL"),
        (("127.0.0.1", "ftp://solver.example.com"), "public URL"),
        (("127.0.0.1", "https://user@solver.example.com"), "public URL"),
        (("127.0.0.1", "https://solver.example.com?x=1"), "public URL"),
        (("127.0.0.1", "https://solver.example.com:99999"), "public URL"),
        (("127.0.0.1", "https://solver.example.com/a b"), "between its slashes"),
        (("127.0.0.1", None, (), "/a/../b"), "between its slashes"),
        (("127.0.0.1", None, (), "/api"), "choose another"),
        (("127.0.0.1", "https://solver.example.com/a", (), "/b"), "--root-path"),
        (("127.0.0.1", None, ("https://a.example",)), "allowed host"),
        (("127.0.0.1", None, ("*",)), "allowed host"),
    ],
)
def test_an_address_that_is_none_is_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        site_of(*given)


@pytest.mark.parametrize("trusted", [(), ("127.0.0.0/8",)])
def test_forwarded_headers_count_from_trusted_proxies_alone(
    monkeypatch: pytest.MonkeyPatch, trusted: tuple[str, ...]
) -> None:
    import uvicorn

    configs: list[uvicorn.Config] = []
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own, which is not ours
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: configs.append(self.config))
    app_module.serve(_Nobody(), "127.0.0.1", 0, Site(), trusted)  # type: ignore[arg-type]
    (config,) = configs
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["client"][0], scope["scheme"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    config.app = inner
    config.load()
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    TestClient(config.loaded_app, client=("127.0.0.1", 1)).get("http://x/", headers=headers)
    assert seen == [("203.0.113.9", "https") if trusted else ("127.0.0.1", "http")]


def test_a_proxy_that_is_no_address_is_refused() -> None:
    from grace_opt.service.http.site import networks

    assert networks(["10.0.0.1", "10.0.0.0/8", "::1"]) == ["10.0.0.1", "10.0.0.0/8", "::1"]
    for wrong in ("*", "proxy.example", "10.0.0.1/8"):
        with pytest.raises(InputError, match="trusted proxy"):
            networks([wrong])


def test_answers_are_json_or_pages_wherever_they_are_below(tmp_path: Path) -> None:
    with Setting(tmp_path, None, Site(None, "/x", ("127.0.0.1",))) as setting:
        assert json.loads(setting.http.get("/x/nothing").content)["status"] == 404
        page = setting.http.get("/x/nothing", headers={"Accept": "text/html"})
        assert 'href="/x/"' in page.text
        assert setting.http.get("/x/api/nothing", headers={"Accept": "text/html"}).json()["status"] == 404
