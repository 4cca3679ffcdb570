"""Stored prompts in a folder: found by their tokens, model and mask alone, and by nothing that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grace_opt import InputError
from grace_opt.export.store import KVStore
from grace_opt.export.store.folder import StoreFolder, weights_sha256
from tests.support.exports import tiny, tiny_mask

IDS = list(range(40, 88))


@pytest.fixture(scope="module")
def store() -> KVStore:
    return KVStore(tiny_mask(tiny()[0]))


def states(store: KVStore, tokens: int) -> Any:
    rng = torch.Generator().manual_seed(tokens)
    shape = (1, store.mask.num_key_value_heads, tokens, store.mask.head_dim)
    return [tuple(torch.randn(shape, generator=rng) for _ in "kv") for _ in store.layers]


class Said(list[str]):
    """A folder's sentences."""

    def folder(self, store: KVStore, at: Path, model: str = "a model") -> StoreFolder:
        return StoreFolder(store, at, model, self.append)


def test_a_prompt_finds_its_longest_stored_beginning(store: KVStore, tmp_path: Path) -> None:
    said = Said()
    one, other = said.folder(store, tmp_path / "new"), said.folder(store, tmp_path / "new")
    names = one.names(IDS, 8)
    assert len(names) == 6
    assert one.longest(names, 8) == 0
    for tokens in (16, 32):
        size = one.save(states(store, tokens), names[tokens // 8 - 1])
        assert size == one.path(names[tokens // 8 - 1]).stat().st_size
    assert other.longest(other.names(IDS, 8), 8) == 32
    assert other.longest(other.names(IDS[:31], 8), 8) == 16
    assert other.longest(other.names(IDS, 16), 16) == 32  # blocks of another size are the same tokens
    assert other.longest(names, 8, beyond=4) == 0
    with other.reading(names[3], 32) as layers:
        for found, wanted in zip(layers, store.decode(one.path(names[3]).read_bytes()), strict=True):
            assert all(map(torch.equal, found, wanted))
    assert said == []


def test_others_do_not_find_it(store: KVStore, tmp_path: Path) -> None:
    said = Said()
    one = said.folder(store, tmp_path)
    name = one.names(IDS, 16)[1]
    one.save(states(store, 32), name)
    another = KVStore(tiny_mask(tiny()[0], seed=1))
    for folder, ids, apart in (
        (said.folder(another, tmp_path), IDS, None),
        (said.folder(store, tmp_path, "its fine-tune"), IDS, None),
        (one, IDS, "a salt"),
        (one, [*IDS[:20], 3, *IDS[21:]], None),
        (one, IDS[1:], None),
    ):
        assert folder.longest(folder.names(ids, 16, apart), 16) == 0
    assert said == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "was altered or damaged in layer 1"),
        (lambda data: b"", "is truncated: it ends in its header"),
        (lambda data: b"PK\3\4" * 99, "is no stored cache"),
    ],
)
def test_what_is_damaged_is_said_once_and_not_found(store: KVStore, tmp_path: Path, damage: Any, sentence: str) -> None:
    said = Said()
    folder = said.folder(store, tmp_path)
    names = folder.names(IDS, 16)
    folder.save(states(store, 16), names[0])
    folder.save(states(store, 32), names[1])
    path = folder.path(names[1])
    data = path.read_bytes()
    path.write_bytes(damage(data))
    for _ in range(3):
        assert folder.longest(names, 16) == 16
    assert len(said) == 1
    assert sentence in said[0]
    assert path.name in said[0]
    with pytest.raises(InputError, match=sentence), folder.reading(names[1], 32) as layers:
        list(layers)
    path.write_bytes(data + b"\0")
    assert folder.longest(names, 16) == 16
    path.write_bytes(data)
    assert folder.longest(names, 16) == 32  # stored again
    assert len(said) == 2


def test_a_file_under_another_name_is_refused(store: KVStore, tmp_path: Path) -> None:
    said = Said()
    folder = said.folder(store, tmp_path)
    names = folder.names(IDS, 16)
    folder.save(states(store, 32), names[1])
    folder.path(names[1]).rename(folder.path(names[2]))
    assert folder.longest(names, 16) == 0
    assert "is the cache of another prompt or model than its name says; store the prompt again" in said[0]
    store.save(states(store, 16), folder.path(names[1]), key=names[1])  # its name, and other tokens
    assert folder.longest(names[:2], 16) == 0
    with pytest.raises(InputError, match="has not the 32 tokens of its name"), folder.reading(names[1], 32) as layers:
        next(layers)


def test_a_folder_that_cannot_be_written_is_said_at_once(store: KVStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Said().folder(store, tmp_path / "file" / "stores").check_writable()
    Said().folder(store, tmp_path / "stores").check_writable()
    assert list((tmp_path / "stores").iterdir()) == []


def test_weights_are_told_apart(tmp_path: Path) -> None:
    model = tiny()[0]
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    model.save_pretrained(tmp_path / "tuned")
    one, again, tuned = (weights_sha256(tmp_path / name) for name in ("one", "again", "tuned"))
    assert one == again != tuned
    assert weights_sha256(tmp_path / "one" / "model.safetensors") == one
    with pytest.raises(InputError, match="has no weights"):
        weights_sha256(tmp_path)
