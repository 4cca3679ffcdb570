"""benchmarks/card.py without a card: what it says then, and the parts that any device can run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from grace_opt.compression import tiles
from grace_opt.runtime.kernels import split
from tests.support import ROOT


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("card")
    sys.modules.pop("card", None)


def test_it_refuses_clearly(card: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as stopped:
        card.main(output=tmp_path / "card.json")
    assert stopped.value.exit_code == 2
    assert "on a CUDA card and this machine has none" in capsys.readouterr().err
    assert not (tmp_path / "card.json").exists()


def test_errors_are_found(card: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The kernels, interpreted, beside the plain one; and a kernel that is wrong in the last row alone."""
    monkeypatch.setattr(split, "INTERPRETED", True)
    monkeypatch.setattr(tiles, "DEVICES", {"cpu"})
    monkeypatch.setattr(card, "SMALL", [(2, 150, 48, 48, 0), (2, 400, 16, 16, 4)])
    report = card.Report()
    with torch.inference_mode():
        card.small(report, "cpu", torch.bfloat16)
    assert [each["met"] for each in report.goals] == [True, True]
    attend = split.TritonKernel.attend

    def wrong(self: Any, request: Any) -> Any:
        out = attend(self, request)
        out[-1] += 1
        return out

    monkeypatch.setattr(split.TritonKernel, "attend", wrong)
    monkeypatch.setattr(card, "SMALL", [(2, 150, 48, 48, 0)])
    with torch.inference_mode():
        card.small(report, "cpu", torch.bfloat16)
    assert report.goals[-1]["met"] is False
    assert "FAIL" in capsys.readouterr().out


def test_goals_of_the_table(card: Any) -> None:
    row = {"what": "keys 48", "tokens": 32768, "error": 1e-3, "of copy": 0.5, "speed-up": 1.0}
    rows = [row | {"batch": 1}, row | {"batch": 16}, row | {"batch": 16, "of copy": 0.9, "error": 0.5}]
    report = card.Report()
    card.judged(report, [{"error": None}, *rows], 16)
    assert [each["met"] for each in report.goals] == [True, True, False, False, True]
    assert json.loads(json.dumps(vars(report)))["goals"][0]["goal"] == "keys 48, 1 x 32768: error"


def test_commands(card: Any) -> None:
    assert card._done([sys.executable, "-c", "print('a'); print('b')"], 60) == (True, "b")
    assert card._done([sys.executable, "-c", "raise SystemExit('no')"], 60) == (False, "no")
