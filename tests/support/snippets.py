"""Run a page's snippets, in order, in one folder, and compare what they print with what the page says they print.

A block of ``bash`` or ``python`` is run; a block of ``text`` right after it is what it prints, with ``...`` for any
lines (alone in a line) or any characters (within one). Seconds may be any; other numbers with a fraction agree to 1e-3,
or to 1e-6 in all. ``toml`` that begins with a comment of a file's name becomes that file. ``<!-- not run: why -->``
before a block says why it is only read. Python blocks of a page share their names, as in one session.

python -m tests.support.snippets PAGE FOLDER runs a page in a folder and writes what has changed into the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = ("bash", "python")
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")
_NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_SECONDS = re.compile(r"\b\d+(\.\d+)?(e-\d+)? s\b|(?<=\"seconds\": )[\d.e-]+")
_PROGRESS = re.compile(r"^.+: \d+( of \d+)?, # s$|^compiling the solvers for this machine")


@dataclass(frozen=True)
class Block:
    """A fenced block: its line in the page, its language and text, and what the page says it prints, or None."""

    line: int
    language: str
    text: str
    printed: str | None
    run: bool


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are there to be run, and its files."""
    found: list[Block] = []
    text = page.read_text(encoding="utf-8")
    matches = list(_FENCE.finditer(text))
    for match, after in zip(matches, [*matches[1:], None], strict=False):
        language = match["language"]
        near = after is not None and after["language"] == "text" and not text[match.end() : after.start()].strip()
        if language in (*RUN, "toml"):
            line = text.count("\n", 0, match.start("text"))
            before = text[: match.start()].rstrip().rpartition("\n")[2]
            runs = language in RUN and not _NOT_RUN.fullmatch(before)
            said = after["text"] if after is not None and near else None
            found.append(Block(line, language, match["text"], said, runs))
    return found


def run(
    page: Path,
    folder: Path,
    replace: Mapping[str, str] | None = None,
    names: dict[str, Any] | None = None,
    differing: Callable[[Block, str], None] | None = None,
) -> int:
    """Run the blocks of a page in ``folder`` and return how many; AssertionError where one fails or prints otherwise.

    ``replace``: what stands for a reader's own things -> what to take here. ``names``: of Python, there already.
    ``differing`` is called, in place of the second error, with a block and what it printed.
    """
    names, made = names or {}, 0
    for block in blocks(page):
        text = block.text
        for old, new in (replace or {}).items():
            text = text.replace(old, new)
        if block.language == "toml" and (named := re.match(r"# (\S+\.toml)\n", text)):
            (folder / named[1]).write_text(text, encoding="utf-8")
        if not block.run:
            continue
        where = f"{page.name}:{block.line}"
        printed = bash(text, folder, where) if block.language == "bash" else python(text, folder, names, where)
        if block.printed is not None:
            wrong = differs(block.printed, printed)
            if wrong is not None and differing is not None:
                differing(block, printed)
                continue
            assert wrong is None, f"{where} {wrong}\n--- the page says\n{block.printed}\n--- it prints\n{printed}"
        made += 1
    return made


def rewrite(page: Path, folder: Path) -> list[int]:
    """Run a page and write into it what it prints now; returns the lines of the blocks that changed."""
    changed: dict[int, tuple[str, str]] = {}
    run(page, folder, differing=lambda block, printed: changed.update({block.line: (block.printed or "", printed)}))
    text = page.read_text(encoding="utf-8")
    for said, printed in changed.values():
        text = text.replace(f"```text\n{said}```", f"```text\n{_as_short(said, printed)}```", 1)
    page.write_text(text, encoding="utf-8")
    return list(changed)


def _as_short(said: str, printed: str) -> str:
    """An output, with those lines left out that the page leaves out."""
    lines = [
        line.rstrip() for line in printed.rstrip("\n").split("\n") if not _PROGRESS.match(_SECONDS.sub("# s", line))
    ]
    shown = said.rstrip("\n").split("\n")
    if "..." in shown:
        first, last = shown.index("..."), shown[::-1].index("...")
        lines = [*lines[:first], "...", *lines[len(lines) - last :]]
    return "".join(f"{line}\n" for line in lines)


def bash(text: str, folder: Path, where: str) -> str:
    """What commands print, on both streams; AssertionError if they fail, other than with a sentence."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", text],
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, "COLUMNS": "120"},
    )
    assert "Traceback" not in done.stdout, f"{where} fails:\n{done.stdout}"
    assert done.returncode == (2 if "error: " in done.stdout else 0), (
        f"{where} exits with {done.returncode}:\n{done.stdout}"
    )
    return done.stdout


def python(text: str, folder: Path, names: dict[str, Any], where: str) -> str:
    """What statements print."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(compile(text, where, "exec"), names)
    return out.getvalue()


def differs(said: str, printed: str) -> str | None:
    """In what an output differs from what a page says of it, or None."""
    expected, found = (list(_lines(each)) for each in (said, printed))
    found = [line for line in found if not _PROGRESS.match(line)]
    return _differ(expected, found)


def _lines(text: str) -> list[str]:
    return [_SECONDS.sub("# s", line).rstrip() for line in text.strip("\n").split("\n")]


def _differ(expected: Sequence[str], found: Sequence[str]) -> str | None:
    at = 0
    for number, line in enumerate(expected):
        if line == "...":
            rest = expected[number + 1 :]
            skips = range(at, len(found) + 1) if rest else [len(found)]
            return next((None for skip in skips if _differ(rest, found[skip:]) is None), f"lacks {rest[:1]}")
        if at == len(found):
            return f"ends before {line!r}"
        if not _same(line, found[at]):
            return f"prints {found[at]!r} where the page has {line!r}"
        at += 1
    return None if at == len(found) else f"goes on with {found[at]!r}"


def _same(said: str, found: str) -> bool:
    if "..." in said:
        return re.fullmatch(".*".join(map(re.escape, said.split("..."))), found) is not None
    first, second = _NUMBER.split(" ".join(said.split())), _NUMBER.split(" ".join(found.split()))
    return len(first) == len(second) and all(
        one == other or (at % 2 == 1 and _near(one, other))
        for at, (one, other) in enumerate(zip(first, second, strict=True))
    )


def _near(one: str, other: str) -> bool:
    fraction = any(mark in number for number in (one, other) for mark in ".e")
    return fraction and abs(float(one) - float(other)) <= max(1e-6, 1e-3 * abs(float(one)))


if __name__ == "__main__":
    print(f"changed: lines {rewrite(Path(sys.argv[1]), Path(sys.argv[2])) or 'none'}")
