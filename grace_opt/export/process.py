"""A runtime in a process of its own: it may not share one with what else is loaded, and may end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError
from grace_opt.files import write_json
from grace_opt.versions import distribution_version


def installed(runtime: str, *distributions: str) -> str:
    """Name and version of the first of these distributions that is installed. Raises InputError if none is."""
    for each in distributions or (runtime,):
        if (version := distribution_version(each)) != "not installed":
            return f"{each} {version}"
    raise InputError(f"{runtime} is not installed here; install it beside grace-opt, or leave the check out")


def answered(module: str, asked: Any, runtime: str, environment: Mapping[str, str] | None = None) -> Any:
    """What ``python -m module ASKED ANSWER`` makes of ``asked``, both JSON.

    ``environment``: variables where the caller's environment has none. Raises InputError with the last line of what the
    process said, if it fails.
    """
    with tempfile.TemporaryDirectory() as work:
        question, answer = Path(work, "asked.json"), Path(work, "answer.json")
        write_json(question, asked)
        command = [sys.executable, "-m", module, str(question), str(answer)]
        settings = {**(environment or {}), **os.environ}
        run = subprocess.run(command, env=settings, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode or not answer.is_file():
            last = next((line.strip() for line in reversed(run.stderr.splitlines()) if line.strip()), "no word")
            raise InputError(
                f"{runtime} could not run what was written ({last[:300]}); see whether it runs the model itself"
            )
        return json.loads(answer.read_text(encoding="utf-8"))
