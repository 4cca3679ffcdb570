"""Progress: a bar on a terminal, a line now and then where there is none, nothing with -q."""

from __future__ import annotations

import io
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from grace_opt.cli import progress as progress_module
from grace_opt.cli.progress import progress
from tests.support.patience import until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_now_and_then_even_while_one_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress_module, "FIRST_LINE", 0.05)
    clock = iter([0.0])
    standing = SimpleNamespace(monotonic=lambda: next(clock, 0.05))  # however long the lines take to come
    monkeypatch.setattr(progress_module, "time", standing)
    with progress(quiet=False) as show:
        show("greedy, heads", 0, 256)
        until(lambda: "0 of 256" in said.getvalue(), "the first line is said")
        show("greedy, heads", 12, 256)
        until(lambda: "greedy, heads: 12 of 256, " in said.getvalue(), "the second line is said")
        show("loading")
        until(lambda: "loading: 0, " in said.getvalue(), "the third line is said")
    lines = said.getvalue().splitlines()
    assert lines[0] == "greedy, heads: 0 of 256, 0 s"
    assert "greedy, heads: 12 of 256, 0 s" in lines
    assert capsys.readouterr().out == ""
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_short_work_and_quiet_work_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with progress(quiet=False) as show:
        show("work", 1, 2)
    monkeypatch.setattr(progress_module, "FIRST_LINE", 0.01)
    with progress(quiet=True) as show:
        show("work", 1, 2)
        time.sleep(0.1)
    assert said.getvalue() == ""


def test_it_ends_with_the_work_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(KeyboardInterrupt), progress(quiet=False):
        raise KeyboardInterrupt
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("TERM", "xterm")
    with progress(quiet=False) as show:
        show("work", 1, 2)
    assert "1/2" in said.getvalue()
