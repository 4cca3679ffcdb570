"""A folder of stored prompts that processes share: a file for each, named by what it is the cache of."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.export.store.frames import AGAIN
from grace_opt.export.store.store import FORMAT, VERSION, KVStore, Pairs, Prompt
from grace_opt.files import check_writable, json_text
from grace_opt.reading import opened

SUFFIX = ".kv"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")  #: files of weights, as engines look for them
_SAMPLE, _SAMPLES = 1 << 12, 1 << 14  # bytes that are hashed of a file of weights at a time, and how often
_REMEMBERED = 1 << 12  # files whose checksums held, or not: an engine asks again and again


class StoreFolder:
    """Stored prompts of one model under one mask; those of others may lie beside them, and are never found.

    A file's name is the sha256 of the model, the mask and all tokens, and stands in its header too. Files appear whole
    (`KVStore.save`), so that any number of processes may read and write.

    Args:
        store: of the mask.
        folder: made if it is missing.
        model: what tells the model from all others: its weights (`weights_sha256`), and what else changes its cache.
        say: gets a sentence for each file that is refused, once.
    """

    def __init__(self, store: KVStore, folder: str | Path, model: str, say: Callable[[str], object]) -> None:
        self.store, self.folder, self._say = store, Path(folder), say
        about = {"format": FORMAT, "version": VERSION, "mask": store.identity, "model": model}
        self._about = json_text(about, sort_keys=True).encode()
        self._holds = lru_cache(_REMEMBERED)(self._verified)

    def check_writable(self) -> None:
        """Raise InputError now if nothing can be written there, rather than after a prompt."""
        check_writable(self.folder / f"new{SUFFIX}")

    def names(self, ids: Sequence[int], step: int, apart: str | None = None) -> list[str]:
        """The name of each prefix of ``step``, 2 ``step``, .. tokens; prompts that are ``apart`` share none."""
        digest, found = hashlib.sha256(self._about), []
        digest.update(json_text(apart).encode())
        for high in range(step, len(ids) + 1, step):
            digest.update(array("q", ids[high - step : high]).tobytes())
            found.append(digest.hexdigest())
        return found

    def longest(self, names: Sequence[str], step: int, beyond: int = 0) -> int:
        """Tokens of the longest of these prefixes that is stored, and whose checksums hold; 0 if none is.

        The first ``beyond`` names are not looked for.
        """
        for count in range(len(names), beyond, -1):
            name = names[count - 1]
            try:
                about = self.path(name).stat()
            except OSError:
                continue
            if self._holds(name, about.st_mtime_ns, about.st_size) == count * step:
                return count * step
        return 0

    def path(self, name: str) -> Path:
        """Where a prompt of this name is, or would be."""
        return self.folder / f"{name}{SUFFIX}"

    def save(self, prompt: Prompt | Pairs, name: str, dtype: str | None = None) -> int:
        """Store a prompt, and return its bytes. Raises InputError as `KVStore.save`."""
        return self.store.save(prompt, self.path(name), dtype, name)

    @contextmanager
    def reading(self, name: str, tokens: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Keys and values [1, H, tokens, n] of each layer, as they are read. Raises InputError as `KVStore.stream`."""
        with self._opened(name) as file:
            yield self._checked(self.store.stream(file, str(self.path(name)), name), name, tokens)

    def _checked(
        self, layers: Iterator[tuple[Tensor, Tensor]], name: str, tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for keys, values in layers:
            if keys.shape[0] != 1 or keys.shape[2] != tokens:
                raise InputError(f"{self.path(name)} has not the {tokens} tokens of its name; {AGAIN}")
            yield keys, values

    def _verified(self, name: str, changed: int, size: int) -> int:
        """Tokens of a file as it is after its last change; 0 if it is refused."""
        try:
            with self._opened(name) as file:
                return self.store.verify(file, str(self.path(name)), name)
        except InputError as error:
            self._say(f"{error}; until then its tokens are computed")
            return 0

    @contextmanager
    def _opened(self, name: str) -> Iterator[BufferedReader]:
        with opened(self.path(name)) as file:
            yield file


def weights_sha256(path: str | Path) -> str:
    """sha256 (hex) of a model's weights, a folder or a file: all of a file up to 64 MiB, and as much of a larger one.

    All of a large model would take minutes. What is hashed is spread evenly, and a fine-tune changes more than a few
    numbers. Raises InputError where there are none.
    """
    path = Path(path)
    found = [path] if path.is_file() else next((each for each in map(sorted, map(path.glob, WEIGHTS)) if each), [])
    if not found:
        raise InputError(f"{path} has no weights ({', '.join(WEIGHTS)}) to tell the model by; give a model's folder")
    digest = hashlib.sha256()
    for each in found:
        with opened(each) as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for at in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                file.seek(at)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
