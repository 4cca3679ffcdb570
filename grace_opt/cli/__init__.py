"""The command line: one module a command. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper


def main() -> None:
    """The console script: run the command of ``sys.argv`` and exit with its code, 130 if interrupted.

    Whatever takes time, imports included, happens inside: an interrupt ends with a word, never with a traceback.
    SIGTERM, by which service managers and batch systems end what they run, is an interrupt too.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # of LANG=C or PYTHONIOENCODING=ascii: \xe9 is better than no table
                stream.reconfigure(errors="backslashreplace")
        from grace_opt.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
