"""What becomes of an export whatever the target: refused with a sentence, whole, or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_opt import InputError, load_mask, save_mask
from grace_opt.export.run import MANIFEST, export, load_manifest
from grace_opt.export.target import TARGETS, compared
from tests.support.command import inside
from tests.support.exports import SHORT, TEXTS, WORDS, Plain, tiny, tiny_mask


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    """The target `Plain`, registered for a test."""
    monkeypatch.setattr(TARGETS, "_known", dict(TARGETS._known))
    return TARGETS.register(Plain)


def test_an_export_is_whole_measured_and_says_what_it_is(
    loaded: tuple[Any, Any], plain: type[Plain], tmp_path: Path
) -> None:
    mask = tiny_mask(loaded[0])
    steps: list[str] = []
    done = export(mask, *loaded, "plain", tmp_path / "out", **SHORT, name="tiny", check=True, progress=steps.append)
    assert steps == ["measure", "write", "check"]
    manifest = load_manifest(tmp_path / "out", "plain")
    assert manifest == done.manifest == json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {"kv_mask.json", "kv_mask.safetensors", "line.txt"}
    assert manifest["measured"]["kl"]["mean"] > 0
    assert (tmp_path / "out" / "line.txt").read_text(encoding="utf-8").startswith("tiny: ")
    assert load_mask(tmp_path / "out").key_keep.keys() == mask.key_keep.keys()
    assert done.checked is not None
    assert done.checked.behind == 0
    assert done.checked.largest == pytest.approx(0, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, {"target": "plian"}, "unknown target 'plian'; did you mean 'plain'"),
        ({"recent_window": 0}, {}, "the target plain needs a recent window; solve with --recent-window 128"),
        ({}, {"kl_limit": 1e-9}, "nats a token as plain runs it .* more than the 1e-09 allowed; solve with"),
        ({}, {"kl_limit": float("nan")}, "must be above 0"),
        ({}, {"fails": True}, "the disk of this test is full"),
        ({}, {"differs": True, "check": True}, "decodes this export otherwise than our cache"),
    ],
)
def test_what_is_refused_leaves_nothing(
    loaded: tuple[Any, Any],
    plain: type[Plain],
    change: dict[str, Any],
    options: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("fails", "differs"):
        monkeypatch.setattr(plain, name, options.pop(name, False))
    target = options.pop("target", "plain")
    with pytest.raises(InputError, match=sentence):
        export(tiny_mask(loaded[0], **change), *loaded, target, tmp_path / "out", **{**SHORT, **options})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(loaded: tuple[Any, Any], plain: type[Plain], tmp_path: Path) -> None:
    mask = tiny_mask(loaded[0])
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(InputError, match="exists already, and nothing is written over; name a new folder"):
            export(mask, *loaded, "plain", tmp_path / name, **SHORT)
    with pytest.raises(InputError, match="cannot write"):
        export(mask, *loaded, "plain", tmp_path / "file" / "out", **SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_mask_of_another_model_is_refused(loaded: tuple[Any, Any], plain: type[Plain], tmp_path: Path) -> None:
    other, _ = tiny(head_dim=32)
    with pytest.raises(InputError, match="it is for keys of 32 channels, and these have 16"):
        export(tiny_mask(other), *loaded, "plain", tmp_path / "out", **SHORT)


def test_a_changed_export_is_found(loaded: tuple[Any, Any], plain: type[Plain], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(tiny_mask(loaded[0]), *loaded, "plain", folder, **SHORT)
    with pytest.raises(InputError, match="version 1 for plain, and version 1 for vllm is read here"):
        load_manifest(folder, "vllm")
    (folder / "line.txt").write_text("other", encoding="utf-8")
    with pytest.raises(InputError, match=r"line.txt is not the file that was exported \(sha256 differs\)"):
        load_manifest(folder, "plain")
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    for old, new, sentence in (
        ('"line.txt"', '"../line.txt"', "is not the file|no such file"),
        ('"version": 1', '"version": 9', "of version 9"),
        ("grace-opt-export", "another", "was not written by grace-opt export"),
        ("kv_mask.json", "kv_mask.jsn", "lacks its list of files"),
        (text[100:], "", "truncated or not JSON"),
    ):
        (folder / MANIFEST).write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(InputError, match=sentence):
            load_manifest(folder, "plain")


def test_tokens_that_our_cache_would_not_decode_are_behind(loaded: tuple[Any, Any]) -> None:
    from grace_opt.evaluate.documents import passages
    from grace_opt.export.target import Source

    model, tokenizer = loaded
    source = Source(tiny_mask(model), model, tokenizer, "tiny", passages(TEXTS, tokenizer, 40, 8, 1))
    found = compared(source, source.passages.ids[0], "other 1", [5] * 6)
    assert found.behind > 0.1
    assert found.largest is None


def test_the_command_line_writes_and_lists(
    loaded: tuple[Any, Any], plain: type[Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    save_mask(tiny_mask(model), "mask")
    Path("words.txt").write_text(WORDS, encoding="utf-8")
    line = ["export", "mask", "model", "--to", "plain", "--text", "words.txt", "--length", 40, "--scored", 8]
    done = inside(*line, "-o", "out", "--kl-limit", "inf", "--check", "-f", "json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["records"]
    assert (record["target"], record["checked"]) == ("plain", "torch 1")
    assert 0 < record["of_full"] < 1.5
    assert load_manifest("out", "plain")["model"] == "model"
    again = inside(*line, "-o", "out", "--kl-limit", "inf")
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    refused = inside(*line, "-o", "other", "--kl-limit", 1e-9)
    assert refused.returncode == 2
    assert "more than the 1e-09 allowed" in refused.stderr
    assert not Path("other").exists()
    listed = inside("targets")
    assert "masks with a window" in listed.stdout
    assert {"target": "plain", "runs": "masks with a window", "runtime": "torch", "tested": []} in json.loads(
        inside("targets", "-f", "json").stdout
    )["records"]
