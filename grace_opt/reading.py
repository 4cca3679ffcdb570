"""Reading files that anyone may have written: only what is a file, never more than it holds, and JSON within bounds."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError

JSON_LIMIT = 16 << 20  #: bytes of a JSON file; values take up to some twenty times as much memory
DEPTH_LIMIT = 64  #: lists and objects inside each other
DIGITS = 300  #: of a whole number; more do not fit any number of the hardware


@contextmanager
def opened(path: str | Path, what: str = "file", *, stream: bool = False) -> Iterator[BufferedReader]:
    """A file, opened for reading bytes. ``stream``: a pipe or a terminal will do too.

    Waits for nobody: a named pipe that nobody has opened for writing is empty. Raises InputError for what is missing,
    is a folder or a device, or cannot be read; also for what fails in the ``with``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"cannot read {path}: no such {what}; check its name") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise _unreadable(path, error, what) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; give a {what}")
        piped = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)
        if not (stat.S_ISREG(mode) or (stream and piped)):
            raise InputError(f"{path} is a pipe or a device; give a {what}")
        if piped:
            os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error, what) from error
    finally:
        os.close(descriptor)


def _unreadable(path: str | Path, error: Exception, what: str) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot read {str(path)!r}: {reason}; check it, or give another {what}")


def read_json(path: str | Path, *, strict: bool = True) -> Any:
    """The value of a JSON file of at most `JSON_LIMIT` bytes; as `parsed`. Raises InputError."""
    with opened(path) as file:
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise InputError(f"{path} has more than {JSON_LIMIT} bytes, which is no JSON file that is read here")
    try:
        return parsed(data, strict=strict)
    except InputError as error:
        raise InputError(f"{path} is truncated or not JSON ({error}); make or fetch it again") from None


def parsed(text: str | bytes, *, strict: bool = True) -> Any:
    """The value of a JSON text, nested at most `DEPTH_LIMIT` deep.

    ``strict``: strings are Unicode, numbers are finite, and whole ones have at most `DIGITS` digits. Raises InputError
    with a reason, which the caller puts in a sentence.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise InputError("its values are nested too deeply") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise InputError("its values are nested too deeply")
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if strict:
                    below += each
            elif isinstance(each, list):
                below += each
            elif strict:
                _check_scalar(each)
        level = below
    return value


def _check_scalar(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError("it holds half of a surrogate pair; mend its \\u escape") from None
    elif isinstance(value, int):
        if abs(value) >= 10**DIGITS:
            raise InputError(f"it holds a whole number of more than {DIGITS} digits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError("it holds a number that is not finite")
