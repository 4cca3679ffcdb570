"""benchmarks/service.py runs, and says what it measured. (It is not part of the wheel; CI lays it beside the tests.)"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import DATA, ROOT

SCRIPT = ROOT / "benchmarks" / "service.py"
HEADS = DATA / "heads-smollm2-135m.safetensors"


@pytest.mark.slow  # half a minute
def test_rows_of_a_small_service() -> None:
    options = ["--heads", "8", "--records", "60", "--seconds", "0.5", "--repeats", "1", "-f", "json"]
    done = subprocess.run([sys.executable, SCRIPT, HEADS, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["records"]
    assert [row["measurement"].partition(",")[0] for row in rows[:5]] == ["run of 8 heads"] * 4 + ["60 records"]
    assert rows[0]["service_over"] == 1
    assert {row["errors"] for row in rows[-2:]} == {0}
    assert all(row["requests_per_second"] > 0 for row in rows[-2:])
