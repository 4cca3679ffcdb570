"""The command line without a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

import pytest

from grace_opt.cli import main


def inside(*arguments: Any, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What a command says and its exit code, run in this process: importing what it needs takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["grace-opt", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.dict(os.environ, environment),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess([], int(ended.value.code or 0), out.getvalue(), err.getvalue())
