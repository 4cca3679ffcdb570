"""Locks and paths are of things, not of names: links, odd letters, files that were removed or replaced, damage."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from grace_opt import InputError
from grace_opt.files import replacing, write_safetensors
from grace_opt.service import plan
from grace_opt.service.db import migrations
from grace_opt.service.db.storage import Storage, opened
from tests.support.setting import CONTENT, DIGEST, Setting


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Storage]:
    """What a server works on, with an upload that is under way."""
    with opened(tmp_path / "data") as found:
        (found.folder / "tmp" / "upload").write_text("half")
        yield found
        assert (found.folder / "tmp" / "upload").exists()


def names_of_the_database(found: Storage, tmp_path: Path) -> dict[str, str]:
    file = found.folder / "grace-opt.db"
    (tmp_path / "soft.db").symlink_to(file)
    os.link(file, tmp_path / "hard.db")
    (tmp_path / "folder").symlink_to(found.folder)
    return {
        "soft": f"sqlite:///{tmp_path / 'soft.db'}",
        "hard": f"sqlite:///{tmp_path / 'hard.db'}",
        "folder": f"sqlite:///{tmp_path / 'folder' / 'grace-opt.db'}",
        "relative": f"sqlite:///{os.path.relpath(file)}",
        "dots": f"sqlite:///{found.folder}/../{found.folder.name}/grace-opt.db",
    }


def test_a_database_has_one_server_whatever_it_is_called(first: Storage, tmp_path: Path) -> None:
    for name, url in names_of_the_database(first, tmp_path).items():
        with pytest.raises(InputError, match="another server works on"):
            Storage(tmp_path / f"other {name}", url).open()


def test_a_data_folder_has_one_server_whatever_its_database(first: Storage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(first.folder)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tmp").symlink_to(first.folder / "tmp")
    for folder in ("data", "link", "parts"):
        with pytest.raises(InputError, match="another server works on the data folder"):
            Storage(tmp_path / folder, f"sqlite:///{tmp_path / 'other.db'}").open()


def test_commands_beside_the_server_still_work(first: Storage, tmp_path: Path) -> None:
    with opened(tmp_path / "data", alone=False) as beside:
        beside.keys.add("ada", "key", "admin")
    assert [key["name"] for key in first.keys.all()] == ["ada"]
    with pytest.raises(InputError, match="another server"):  # nor did closing that let the lock go
        Storage(tmp_path / "data").open()


@pytest.mark.parametrize("name", ["what?x=1", "a#b", "100%25 %", "with spaces", "ü[x]", "a;b&c", ":memory:"])
def test_no_letter_of_a_folder_moves_the_database(tmp_path: Path, name: str) -> None:
    with opened(tmp_path / name) as found:
        found.keys.add("ada", "key", "admin")
    assert sorted(each.name for each in tmp_path.iterdir()) == [name]
    assert (tmp_path / name / "grace-opt.db").stat().st_size > 0
    with opened(tmp_path / "other", f"sqlite:///{tmp_path / name / 'grace-opt.db'}") as again:
        assert len(again.keys.all()) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_database_that_is_removed_or_replaced_is_noticed(tmp_path: Path, replaced: bool) -> None:
    with Setting(tmp_path, None) as setting:
        file = setting.storage.folder / "grace-opt.db"
        file.rename(tmp_path / "elsewhere.db")
        if replaced:
            file.write_bytes((tmp_path / "elsewhere.db").read_bytes())
        for answer in (setting.upload(), setting.http.get("/api/runs")):
            assert answer.status_code == 503
            assert "removed or replaced" in answer.json()["detail"]
        assert file.exists() == replaced  # no empty one was made in its place
        file.unlink(missing_ok=True)
        (tmp_path / "elsewhere.db").rename(file)
        assert setting.upload().status_code == 201


KILLED = """
import os, sys
from alembic.operations import Operations
from grace_opt.service.db.storage import Storage
made = []
create = Operations.create_table
def dying(self, name, *columns, **more):
    if len(made) == 3:
        os.kill(os.getpid(), 9)
    made.append(name)
    return create(self, name, *columns, **more)
Operations.create_table = dying
from alembic import op
op.create_table = lambda *a, **k: dying(op._proxy, *a, **k)
Storage(sys.argv[1]).open()
"""


def test_a_kill_while_the_tables_are_made_leaves_a_folder_of_use(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "data")], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    with opened(tmp_path / "data") as found:
        assert found.runs.counts()["queued"] == 0


def test_tables_that_an_earlier_version_left_half_made_are_made_anew(tmp_path: Path) -> None:
    old = Storage(tmp_path / "data")
    with old.database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("CREATE TABLE api_keys (name VARCHAR(100) NOT NULL)"))
    old.close()
    with opened(tmp_path / "data") as found:
        found.keys.add("ada", "key", "admin")
    assert migrations.VERSION == "alembic_version"


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import command

    real = command.upgrade

    def failing(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise SQLAlchemyError("no more")

    monkeypatch.setattr(command, "upgrade", failing)
    with pytest.raises(InputError, match="no more"):
        Storage(tmp_path / "data").open()
    monkeypatch.undo()
    found = Storage(tmp_path / "data")
    with found.database.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM sqlite_master")).scalar() == 0
    found.close()


def test_a_damaged_bundle_is_repaired_by_uploading_it_again(tmp_path: Path) -> None:
    with Setting(tmp_path, None) as setting:
        assert setting.upload().status_code == 201
        blob = setting.storage.blobs.path(DIGEST)
        for damage in (CONTENT[:-8] + b"\0" * 8, CONTENT[:100], b""):  # the first is a bundle, but not this one
            blob.write_bytes(damage)
            plan.load_once.cache_clear()
            for answer in (setting.http.get(f"/api/bundles/{DIGEST}"), setting.submit()):
                assert answer.status_code == 404
                assert "upload it again" in answer.json()["detail"]
            assert setting.upload().status_code == 201
            assert blob.read_bytes() == CONTENT


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_for_whom_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "a" / "x.safetensors") as file:
            write_safetensors(file, {"x": np.zeros(3)}, {})
        write_safetensors(tmp_path / "y.safetensors", {"x": np.zeros(3)}, {})
        with opened(tmp_path / "data") as found:
            blob = found.blobs.path(found.blobs.put(b"content"))
            files = [tmp_path / "a" / "x.safetensors", tmp_path / "y.safetensors", blob, found.folder / "grace-opt.db"]
            modes = {stat.S_IMODE(path.stat().st_mode) for path in files}
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask}
