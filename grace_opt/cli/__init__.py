"""The command line: one module a command. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script: run the command of ``sys.argv`` and exit with its code, 130 if interrupted.

    Whatever takes time, imports included, happens inside: an interrupt ends with a word, never with a traceback.
    """
    try:
        from grace_opt.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
