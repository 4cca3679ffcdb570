"""Writing files that appear under their name only when they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.errors import InputError, shown
from grace_opt.reading import opened

#: of JSON in ASCII: what stays as it is (a backslash, a whole pair), or else half of a surrogate pair
_ESCAPES = re.compile(r"(\\\\|\\ud[89ab]..\\ud[c-f]..)|\\ud[89a-f]..")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed to it when the block succeeds, deleted when it fails.

    Raises InputError when the folder or the file cannot be written (no such folder, no permission, disk full).
    """
    path = _target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is as long as names may be leaves no room for more.
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another place or free some space") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; renamed to it when the block succeeds, deleted when it fails.

    Raises InputError where something has that name already, which stays as it is, or the folder cannot be written.
    """
    path = check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            check_new(path)
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another place or free some space") from error


def check_new(path: str | Path) -> Path:
    """The whole path of a folder that is yet to be made. Raises InputError where something has its name."""
    try:
        path = Path(path).absolute()
        taken = os.path.lexists(path)
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(path)!r}: {reason}; choose another place") from error
    if taken or not path.name:
        raise InputError(f"{path} exists already, and nothing is written over; name a new folder")
    return path


def check_writable(path: str | Path) -> None:
    """Raise InputError now if ``path`` cannot be written, rather than after the work. Makes its folder."""
    path = _target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def _target(path: str | Path) -> Path:
    """Where a link leads, if it is a place for a file: renaming would replace a link, or a device, by a file."""
    try:
        path = Path(path).resolve()
        taken = path.exists() and not path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {str(path)!r}: {reason}; choose another place") from error
    if taken:
        raise InputError(f"cannot write {path}: it is not a file; name a new file or one to replace")
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically. Bytes of a file's name that are no UTF-8 are written as escapes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (`json_text`) atomically."""
    write_text(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, **options: Any) -> str:
    r"""Strict JSON in ASCII: no NaN, and no half of a surrogate pair, as a file's name has for bytes that are no UTF-8.

    Such a byte FF is written as the text ``\udcff``, as on the standard error; many readers of JSON refuse the other.
    ``options`` are those of `json.dumps`.
    """
    text = json.dumps(value, allow_nan=False, **options)
    return _ESCAPES.sub(lambda found: found[1] or "\\" + found[0], text)


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place (use under `replacing`); tensors keep their dtype, stored C-contiguous."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    about = {shown(str(key)): _unicode(str(value)) for key, value in metadata.items()}  # names of files may be bytes
    for name, array in tensors.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise InputError(f"cannot write {name}: there is no place for {array.dtype}; use float64")
    path = Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # as the umask says; safetensors makes a file that only its owner reads
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, path, metadata=about)
    except SafetensorError as error:  # its way to report a full disk
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error
    path.chmod(mode)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file. Raises InputError if it cannot be read."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
