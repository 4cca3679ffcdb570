"""The picture of a mask: drawn without touching matplotlib's state of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DRAW = """
import sys, matplotlib
from grace_opt import KVMask
from grace_opt.reports.kept_channels import kept_channels
state = lambda: dict(dict.items(matplotlib.rcParams))  # to ask for the backend would choose one
before = state()
mask = KVMask.of_channels("m", 2, 16, {layer: [[0, 3, 9], [1, 2, 15]] for layer in range(3)})
kept_channels(mask, sys.argv[1], "title")
assert state() == before
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_mask_is_drawn_and_the_backend_is_left_as_it_was(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / "mask.png")], check=True)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
