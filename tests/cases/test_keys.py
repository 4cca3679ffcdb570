"""Good keys are found before anything is counted: nobody's wrong tries lock somebody else out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grace_opt.service.http import access
from grace_opt.service.http.access import COOKIE, new_key
from tests.support.setting import Setting


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Setting, str]]:
    """A service that needs keys, and one of them; its address has used up its wrong tries."""
    with Setting(tmp_path, None, keys_required=True) as setting:
        key = new_key()
        setting.storage.keys.add("ada", key, "admin")
        codes = [setting.http.get("/api/runs", headers=bearer("stale")).status_code for _ in range(12)]
        assert codes == [401] * 10 + [429] * 2
        yield setting, key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_good_key_works_whatever_others_of_its_address_try(locked: tuple[Setting, str]) -> None:
    setting, key = locked
    assert setting.http.get("/api/runs", headers=bearer(key)).status_code == 200
    assert setting.http.post("/api/bundles", content=b"", headers=bearer(key)).status_code == 422  # let in
    for _ in range(30):
        assert setting.http.get("/api/runs/1/records", headers=bearer("stale")).status_code == 429
        assert setting.http.get("/api/runs/1/records", headers=bearer(key)).status_code == 404
    assert setting.http.get("/healthz").status_code in (200, 503)  # which is for no key at all


def test_a_browser_with_a_key_that_is_gone_is_asked_for_another(locked: tuple[Setting, str]) -> None:
    setting, key = locked
    stale = {"Cookie": f"{COOKIE}=stale", "Accept": "text/html"}
    asked = setting.http.get("/?state=failed", headers=stale)
    assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=/%3Fstate%3Dfailed")
    assert setting.http.get("/login", headers=stale).status_code == 200
    wrong = setting.http.post("/login", data={"key": "wrong"}, headers=stale)
    assert wrong.status_code == 429
    assert "try again in" in wrong.text
    right = setting.http.post("/login", data={"key": key}, headers=stale)
    assert right.status_code == 303
    assert setting.http.post("/login", content="&".join(["a=b"] * 99), headers=stale).status_code == 422


def test_a_key_s_rate_is_its_own(tmp_path: Path) -> None:
    with Setting(tmp_path, None, keys_required=True, requests_per_second=0.01) as setting:
        setting.service.access._rates.burst = 3.0
        keys = {name: new_key() for name in ("ada", "ci")}
        for name, key in keys.items():
            setting.storage.keys.add(name, key, "read")
        for key in keys.values():
            codes = [setting.http.get("/api/runs", headers=bearer(key)).status_code for _ in range(5)]
            assert codes == [200, 200, 200, 429, 429]
        assert setting.http.get("/api/runs", headers=bearer("stale")).status_code == 401  # counted apart


def test_what_a_wrong_key_costs_does_not_grow(locked: tuple[Setting, str], monkeypatch: pytest.MonkeyPatch) -> None:
    setting, _ = locked
    reads = []
    every = setting.storage.keys.all
    monkeypatch.setattr(setting.storage.keys, "all", lambda: reads.append(1) or every())
    monkeypatch.setattr(access, "KEYS_SECONDS", 1e9)
    setting.service.access._read = -1.0
    for i in range(20):
        assert setting.http.get("/api/runs", headers=bearer(f"stale {i}")).status_code == 429
    assert len(reads) == 1  # one look at the database, for however many tries
    assert len(setting.service.access._failures._buckets) == 1
