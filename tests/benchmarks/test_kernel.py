"""benchmarks/kernel.py on a CPU: its rows, and what they count."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from grace_opt.runtime.kernels import cpu, cpu_program
from tests.support import ROOT

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("kernel")
    for name in ("kernel", "cpu_kernel"):
        sys.modules.pop(name, None)


def test_rows_of_a_cpu(kernel: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed = kernel.cpu_kernel
    shapes = [timed.Shape(2, 3, 16, 6, 7), timed.Shape(2, 3, 16, 6, 7, 4)]
    monkeypatch.setattr(timed, "SHAPES", shapes)
    monkeypatch.setattr(timed, "COLD", 1e5)
    kernel.main(device="cpu", context=512, format="json", dtype="float32")
    records = json.loads(capsys.readouterr().out)["records"]
    assert [record["bits"] for record in records] == [0, 4]
    for record in records:
        assert 0 < record["kernel ms"] <= record["step ms"]
        # The same bytes over different times.
        assert record["kernel share"] * record["kernel ms"] == pytest.approx(record["step share"] * record["step ms"])
    assert records[0]["kernel share"] * records[0]["kernel ms"] * records[0]["read GB/s"] * 1e6 == pytest.approx(
        2 * 512 * (6 + 7) * 4
    )
    assert cpu_program._run.__module__ == cpu_program.__name__  # what was put in its place to time it is gone
