"""What libraries read from the environment: proxies, netrc, certificates, PG*, encodings of the terminal, its size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from grace_opt import InputError
from grace_opt.cli.output import Format, print_records, shown
from grace_opt.service.client import Client
from grace_opt.service.db.database import Database
from grace_opt.service.network import is_this_machine, proxy_of
from tests.support.serving import live, new_database

PROXIES = [f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO")]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that tells the key that it was sent, as the bundle's name."""

    async def bundles(request: Request) -> Response:
        row = {"digest": "0" * 64, "nbytes": 1, "heads": 1, "about": {}, "created": ""}
        return JSONResponse({**row, "name": request.headers.get("Authorization", "")})

    with live(Starlette(routes=[Route("/api/bundles/{digest}", bundles)])) as url:
        yield url


def sent_key(url: str, key: str | None, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("x")
    with Client(url, key) as client:
        return client.upload(tmp_path / "file").name


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense", "ftp://x:y"])
def test_no_proxy_for_a_service_on_this_machine(
    echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    assert sent_key(echo, "secret", tmp_path) == "Bearer secret"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost.", "a.localhost", "127.0.0.1", "127.8.8.8", "127.1", "::1", "::ffff:127.0.0.1"]
)
def test_names_of_this_machine(host: str) -> None:
    assert is_this_machine(host)


@pytest.mark.parametrize("host", ["localhost.example", "10.0.0.1", "1270.0.0.1", "2001:db8::1", "x127.0.0.1"])
def test_names_of_other_machines(host: str) -> None:
    assert not is_this_machine(host)


@pytest.mark.parametrize(
    ("url", "exempt"),
    [
        ("http://solver.example", "solver.example"),
        ("http://solver.example", ".example"),
        ("http://solver.example:81", "solver.example:81"),
        ("http://10.1.2.3", "10.0.0.0/8"),
        ("http://10.1.2.3", "other, 10.1.2.3"),
        ("http://x", "*"),
    ],
)
def test_no_proxy_is_honoured(monkeypatch: pytest.MonkeyPatch, url: str, exempt: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    assert proxy_of(httpx.URL(url)) == "http://proxy.example:3128"
    monkeypatch.setenv("NO_PROXY", exempt)
    assert proxy_of(httpx.URL(url)) is None
    assert proxy_of(httpx.URL("http://other.org:82")) == (None if exempt == "*" else "http://proxy.example:3128")


@pytest.mark.parametrize("proxy", ["ftp://me:secret@x:1", "http://me:secret@[::x", "http://me:secret@x:99999", "//"])
def test_a_proxy_of_no_use_is_a_sentence_without_its_password(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InputError, match=r"proxy .* cannot be used .* NO_PROXY") as said:
        Client("http://solver.example")
    assert "secret" not in str(said.value)


def test_a_netrc_does_not_take_the_place_of_the_key(echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\ndefault login me password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sent_key(echo, "secret", tmp_path) == "Bearer secret"
    assert sent_key(echo, None, tmp_path) == sent_key(echo, "", tmp_path) == ""


@pytest.mark.parametrize("key", ["a\nb", "clé", "two words", "\x1b[31m"])
def test_a_key_that_is_none_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InputError, match="the API key has characters") as said:
        Client("http://127.0.0.1:1", key)
    assert key not in str(said.value)


def test_certificates_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name, value in (
        ("SSL_CERT_FILE", tmp_path / "none.pem"),
        ("SSL_CERT_FILE", tmp_path / "empty.pem"),
        ("SSL_CERT_DIR", tmp_path / "none"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(value))
            with pytest.raises(InputError, match=f"{name} names {value}.*unset it"):
                Client("https://solver.example")
            Client("http://127.0.0.1:1")  # needs no certificates


def test_a_server_without_tls_is_told_from_one_that_is_away(echo: str) -> None:
    with Client(echo.replace("http:", "https:")) as client, pytest.raises(InputError, match="does not speak https"):
        client.runs()


def test_settings_of_postgresql_in_the_environment(
    postgres_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = new_database(postgres_server)
    monkeypatch.setenv("PGCLIENTENCODING", "SQL_ASCII")  # texts would come as bytes
    monkeypatch.setenv("PGHOSTADDR", "192.0.2.1")  # nobody's: the URL's host counts
    database = Database(url)
    database.upgrade()
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT 'é→'")).scalar() == "é→"
    database.close()


TABLE = """
from grace_opt.cli import output
import grace_opt.cli as cli, grace_opt.cli.app as app, sys
def run(arguments):
    output.print_records([{"name": "\\u00e9\\u2192", "more": "x" * 90}], output.Format.TABLE)
    output.say("\\u00e9")
    return 0
app.run = run
cli.main()
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1", "PYTHONUTF8": "1"},
        {"COLUMNS": "0", "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent", "TMPDIR": "/nonexistent"},
    ],
    ids=lambda each: next(iter(each)),
)
def test_a_table_is_printed_whatever_the_terminal_is(environment: dict[str, str]) -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-c", TABLE], capture_output=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert b"x" * 90 in done.stdout  # not folded: nobody's terminal is narrow


HOSTILE = [
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("a\rb\nc\x00", r"a\rb\nc\x00"),
    ("\u202egnp.exe", r"\u202egnp.exe"),
    ("\x9b31m", r"\x9b31m"),
    ("[bold]x[/nothing] :smile:", "[bold]x[/nothing] :smile:"),
    ("é 漢字 ok", "é 漢字 ok"),
]


@pytest.mark.parametrize(("name", "expected"), HOSTILE)
def test_names_of_others_do_nothing_to_a_terminal(name: str, expected: str, capsys: pytest.CaptureFixture[Any]) -> None:
    assert shown(name) == expected
    print_records([{"name": name}], Format.TABLE)
    assert capsys.readouterr().out.split("\n")[1].rstrip() == expected
