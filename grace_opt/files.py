"""Files that appear under their name only when they are whole, and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed to it when the block succeeds, deleted when it fails.

    Raises InputError when the folder or the file cannot be written (no such folder, no permission, disk full).
    """
    path = _target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another place or free some space") from error


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
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is not a file; name a new file or one to replace")
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path}: {error}; choose another place") from error
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place (use under `replacing`); tensors keep their dtype, stored C-contiguous."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # as the umask says; safetensors makes a file that only its owner reads
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, path, metadata=dict(metadata))
    except SafetensorError as error:  # its way to report a full disk
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error
    path.chmod(mode)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises InputError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(sorted((file.metadata() or {}).items()))  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error}); make or fetch it again") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises InputError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is truncated or not JSON ({error}); make or fetch it again") from None


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file. Raises InputError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
