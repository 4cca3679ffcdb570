"""Fail if the wheel lacks a module of the checkout or holds anything else."""

import sys
import zipfile
from pathlib import Path

root = Path(__file__).parent.parent
sources = [(root, "grace_opt"), (root / "solvers", "grace_solvers")]
expected = {
    str(path.relative_to(base))
    for base, package in sources
    for path in (base / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
found = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
if found != expected:
    sys.exit(f"wheel lacks {sorted(expected - found)}, and holds besides {sorted(found - expected)}")
print(f"the wheel holds the {len(found)} files of both packages")
