"""What the Triton kernels compile to for cards that are not there (`tests.support.ahead_of_time`).

Ratios: how many times a multiprocessor of an H100 could issue a loop's instructions while it copies a tile's bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SHARED = {80: 166912, 86: 101376, 90: 232448}  # bytes that a program may take


def compiled(tmp_path: Path, sm: int, kernels: list[str], *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of these kernels in each case; what holds for all of them is asserted."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.ahead_of_time",
            json.dumps({"sm": sm, "kernels": kernels, "cases": cases}),
        ],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == len(kernels) * len(cases)
    for each in found:
        assert each["spills"] == 0, each
        assert each["shared"] <= SHARED[sm], each
        if each["kernel"].startswith("attend"):
            assert each["shared"] <= each["most_shared"], each
            assert each["registers"] <= 168, each  # `triton_card.resident` counts on three programs
    return found


def assert_wide(record: dict[str, Any], share: float) -> None:
    """Loads of 4 bytes and more, this share of bytes by loads of 16, and of one tile."""
    loads = {int(size): count for size, count in record["loads"].items()}
    assert min(loads) >= 4, record
    nbytes = {size: size * count * 32 * record["warps"] for size, count in loads.items()}
    assert nbytes[16] >= share * sum(nbytes.values()), record
    assert record["tile"] <= sum(nbytes.values()) <= 1.8 * record["tile"], record


@pytest.mark.parametrize("sm", [80, 90])
def test_rows(tmp_path: Path, sm: int) -> None:
    """Of widths that fill 16 bytes, and of those that do not."""
    for each in compiled(tmp_path, sm, ["attend_far"], {"dk": 48, "dv": 48}, {"dk": 51, "dv": 51}):
        assert_wide(each, 0.7)
        assert each["issue"] >= 1.5


@pytest.mark.parametrize("sm", [80, 90])
def test_integers(tmp_path: Path, sm: int) -> None:
    cases = [{"dk": d, "dv": d, "bits": bits} for d, bits in ((48, 4), (64, 4), (48, 8))]
    for each in compiled(tmp_path, sm, ["attend_codes"], *cases):
        assert_wide(each, 0.5)  # scales are words of 4 bytes, which several threads read
        assert each["issue"] >= 1.3


def test_integers_in_float16(tmp_path: Path) -> None:
    """Whose codes take an instruction more."""
    cases = [{"dk": 128, "dv": 96, "bits": bits, "dtype": "float16", "mask": "added"} for bits in (4, 8)]
    for each in compiled(tmp_path, 86, ["attend_codes"], *cases):
        assert each["issue"] >= 1


def test_what_comes_before_and_after(tmp_path: Path) -> None:
    """Of heads of 128 and 256 channels, and after integers, on the smallest card."""
    cases = [
        {"dk": 48, "dv": 48, "bits": 4},
        {"dk": 128, "dv": 128, "width": 256, "mask": "bool", "device_length": True},
    ]
    compiled(tmp_path, 86, ["prepare", "merge"], *cases)


def test_a_mask_and_the_smallest_card(tmp_path: Path) -> None:
    """A mask costs something, and not the goal; the widest rows fit 99 KiB."""
    masked = {"dk": 48, "dv": 48, "mask": "bool", "device_length": True}
    few, wide = compiled(tmp_path, 86, ["attend_far"], masked, {"dk": 256, "dv": 256, "width": 256})
    assert few["issue"] >= 1.5
    assert_wide(wide, 0.7)
