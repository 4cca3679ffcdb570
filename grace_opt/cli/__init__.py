"""The command line: one module a command. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing takes longer to import than all that is here
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """The console script: run the command of ``sys.argv`` and exit with its code; 130 if interrupted, 143 by SIGTERM.

    Whatever takes time, imports included, happens inside: Ctrl-C and SIGTERM end with a word, never with a traceback,
    and so does a reader of the output that has gone away (exit code 1).
    """
    terminated: list[int] = []
    code = 1
    try:
        _prepare(terminated)
        from grace_opt.cli.app import run

        code = run(sys.argv[1:])
        sys.stdout.flush()  # while its failure can be told
    except KeyboardInterrupt:
        code = 143 if terminated else 130
        _say("terminated" if terminated else "interrupted")
    except OSError as error:  # of the flush
        code = _no_output(error)
    _leave(code)


def _prepare(terminated: list[int]) -> None:
    """Standard streams that are there, and signals that become KeyboardInterrupt wherever they arrive."""
    import os
    import signal
    from io import TextIOWrapper

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the end of the process)
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            # of LANG=C or PYTHONIOENCODING=ascii: \xe9 is better than no table
            stream.reconfigure(errors="backslashreplace")

    def terminate(number: int, frame: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = _unraisable


def _unraisable(about: Any) -> None:
    """An interrupt where Python cannot raise, as in a callback of its import locks, comes again a moment later."""
    if issubclass(about.exc_type, KeyboardInterrupt):
        import os
        import signal
        import threading

        again = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(about)


def _say(message: str) -> None:
    from contextlib import suppress

    with suppress(OSError):  # nobody listens
        print(message, file=sys.stderr, flush=True)


def _no_output(error: OSError) -> int:
    """Standard output cannot be written: silence where its reader has gone, a sentence elsewhere."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own flush does not complain
    if isinstance(error, BrokenPipeError):
        return 1
    _say(f"error: cannot write to standard output ({error.strerror or error})")
    return 2


def _leave(code: int) -> None:
    """Exit. Another Ctrl-C, while Python waits for threads or clears up, ends the process at once."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.unraisablehook = sys.__unraisablehook__
    sys.exit(code)
