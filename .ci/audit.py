"""Fail if an installed package has a known vulnerability: reads what pip-audit wrote (JSON).

    pip-audit --format json --output audit.json; python .ci/audit.py audit.json

Where the advisory database cannot be reached, pip-audit skips every package; that is said, and is no failure.
"""

import json
import sys
from pathlib import Path

packages = json.loads(Path(sys.argv[1]).read_text())["dependencies"]
skipped = [package["name"] for package in packages if "skip_reason" in package]
bad = [package for package in packages if package.get("vulns")]
for package in bad:
    for found in package["vulns"]:
        print(
            f"{package['name']} {package['version']}: {found['id']}, mended in {found['fix_versions'] or 'no version'}"
        )
print(f"{len(packages) - len(skipped)} packages audited, {len(skipped)} not found by pip-audit, {len(bad)} vulnerable")
sys.exit(bool(bad))
