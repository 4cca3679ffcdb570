"""Files of every kind and name where a file is read or written: one sentence, nobody waits, nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grace_opt import InputError, load_bundle, load_mask, save_bundle
from grace_opt.cli.app import run
from grace_opt.cli.config import read_config
from grace_opt.cli.output import Format, print_records
from grace_opt.compare import compare
from grace_opt.errors import shown
from grace_opt.evaluate.documents import Document, read_documents
from grace_opt.files import check_writable, file_sha256, json_text, write_json, write_text
from grace_opt.models.bounds import check_config
from grace_opt.models.texts import read_pieces, read_text
from grace_opt.reading import read_json
from tests.support import DATA

HEADS = DATA / "heads-smollm2-135m.safetensors"
BYTES = os.fsdecode(b"caf\xe9")  #: a name that is no UTF-8
LONG = "x" * 255  #: as long as names may be

READERS: dict[str, Callable[[Path], Any]] = {
    "bundle": load_bundle,
    "mask": lambda path: load_mask(path.parent),
    "json": read_json,
    "sha256": file_sha256,
    "config": lambda path: read_config(path, "solve"),
    "text": lambda path: read_text(str(path)),
    "documents": read_documents,
    "jsonl": read_documents,
}


def place(folder: Path, reader: str) -> Path:
    return folder / {"mask": "kv_mask.json", "jsonl": "file.jsonl"}.get(reader, "file")


KINDS = ("folder", "pipe", "zero", "loop", "missing", "long", "nul", "below a file")
ODD = [pair for pair in itertools.product(READERS, KINDS) if pair != ("documents", "folder")]  # that holds texts


@pytest.mark.parametrize(("reader", "kind"), ODD)
def test_what_is_no_file(reader: str, kind: str, tmp_path: Path) -> None:
    path = place(tmp_path, reader)
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":  # that nobody writes to
            os.mkfifo(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "long":
            path = path.parent / ("x" * 300) / path.name
        case "nul":
            path = path.parent / "a\0b" / path.name
        case "below a file":
            (tmp_path / "plain").touch()
            path = tmp_path / "plain" / path.name
    if kind == "pipe" and reader in ("text", "config", "documents"):  # it is empty
        assert READERS[reader](path) in ("", {}, [Document("file", "", cut=True)])
        return
    with pytest.raises(InputError) as caught:
        READERS[reader](path)
    assert str(caught.value).isprintable()


def test_a_pipe_that_is_written_to_is_a_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    file = os.fdopen(os.open(tmp_path / "pipe", os.O_RDWR), "wb")  # the writer is there first

    def write() -> None:
        with file:
            file.write(b"all of it " * 50_000)  # more than a pipe holds: it waits for the reader

    writer = threading.Thread(target=write)
    writer.start()
    assert len("".join(read_pieces(str(tmp_path / "pipe")))) == 10 * 50_000
    writer.join()


def test_a_text_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("grace_opt.models.texts.TEXT_LIMIT", 100_000)
    (tmp_path / "text").write_text("word " * 50_000)
    with pytest.raises(InputError, match="has more than 100000 characters"):
        read_text(str(tmp_path / "text"))


def test_a_configuration_of_a_model_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer.json is a pipe or a device"):
        check_config(str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_a_file_that_cannot_be_read_from(tmp_path: Path) -> None:
    """Reading fails after it was opened, whoever asks (root may open all)."""
    with pytest.raises(InputError, match="cannot read '/proc/self/mem': Input/output error"):
        file_sha256("/proc/self/mem")


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), check_writable])
def test_what_cannot_be_written(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = [tmp_path, tmp_path / "file" / "x", tmp_path / "loop", Path("/proc/none/x"), tmp_path / "a\0b"]
    for path in (*cases, tmp_path / ("x" * 300), Path("/dev/full")):
        if write is check_writable and len(path.name) == 300:
            continue  # known when it is written
        with pytest.raises(InputError, match="cannot write"):
            write(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", [LONG, BYTES, "🦙 é\u202e", "a\x1b[31m"])
def test_any_name_of_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written, read, solved, compared and shown, by names that no text can hold too."""
    if len(name) < 255:
        shutil.copy(HEADS, tmp_path / name)
        bundle = tmp_path / name
    else:
        save_bundle(load_bundle(HEADS), bundle := tmp_path / name)
    solved = ["solve", bundle, "--ratio", "0.5", "--solver", "greedy", "-f", "json", "-o", tmp_path / "mask"]
    assert run([*map(str, solved)]) == 0
    json.loads(capsys.readouterr().out).values()
    assert run(["compare", str(bundle), "--ratio", "0.5", "--solver", "greedy", "-o", str(tmp_path / "runs")]) == 0
    assert shown(capsys.readouterr().out.replace("\n", " "))
    (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    for line in (tmp_path / "runs" / "records.jsonl").read_text(encoding="ascii").splitlines():
        json.loads(line)["bundle"].encode()
    compare([bundle], {"greedy": {}}, [0.5], tmp_path / "runs")
    assert run(["solve", f"{bundle}-none", "--ratio", "0.5", "-o", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_a_bundle_of_a_model_whose_name_is_no_unicode(tmp_path: Path) -> None:
    sound = load_bundle(HEADS)
    about = {**sound.metadata, "model": BYTES, "text": "a\udcffb"}
    save_bundle(type(sound)(sound.heads, about), tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").metadata["model"] == "caf\\udce9"
    with pytest.raises(InputError, match="'model' has 5000 characters"):
        save_bundle(type(sound)(sound.heads, {"model": "x" * 5000}), tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").metadata["model"] == "caf\\udce9"


def test_json_and_tables_of_any_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    texts = [BYTES, "\ud83e", "🦙", "\\udcff", "\\\udcff", "a\x1b[2Jb", "[bold]x[/bold]", "[/x]"]
    assert json.loads(json_text(texts)) == ["caf\\udce9", "\\ud83e", "🦙", "\\udcff", "\\\\udcff", *texts[5:]]
    print_records([{"name": text} for text in texts], Format.TABLE)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]x[/bold]" in out
    assert "caf\\udce9" in out
    print_records([{"name": BYTES}], Format.JSON)
    json.loads(capsys.readouterr().out)["records"][0]["name"].encode()
    write_text(tmp_path / "file", BYTES)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "caf\\udce9"


def test_a_terminal_that_knows_no_letters_but_ascii(tmp_path: Path) -> None:
    for name in ("modèle🦙", "other"):
        shutil.copy(HEADS, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "grace_opt",
        "compare",
        "modèle🦙",
        "other",
        "--ratio",
        "0.5",
        "--solver",
        "greedy",
        "-o",
        "r",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"mod\\xe8le" in done.stdout


def test_a_sentence_is_short_and_can_be_shown() -> None:
    error = InputError(f"no such file: {'x' * 10**6}\x1b[31m\n\udcff")
    assert len(str(error)) <= 1220
    assert str(error).isprintable()
    assert str(InputError("as it is: é 🦙")) == "as it is: é 🦙"


def test_a_config_file_says_what_options_take(tmp_path: Path) -> None:
    for text, said in {
        "[method]\nratio = {a = 1}": "sets method.ratio to what no option takes",
        "[method]\nratio = 1979-05-27": "sets method.ratio to what no option takes",
        "a = " + "[" * 5000: "is not TOML",
        f"[method]\nratio = {'9' * 5000}": "is not TOML",
        "[method]\nratio = \xff": "is not TOML",
        "#" * (1 << 21): "has more than",
    }.items():
        (tmp_path / "file").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=said):
            read_config(tmp_path / "file", "solve")


def test_a_folder_that_may_not_be_entered_or_written(tmp_path: Path) -> None:
    """As a user without rights, which the one who runs the tests may not be."""
    (tmp_path / "closed").mkdir()
    shutil.copy(HEADS, tmp_path / "closed" / "bundle")
    (tmp_path / "closed").chmod(0)
    code = (
        "import os, sys\n"
        "from grace_opt import InputError, load_bundle, load_mask\n"
        "from grace_opt.files import write_json\n"
        "import grace_opt.compression.mask_file\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "for work in (lambda f: load_bundle(f'{f}/bundle'), load_mask, lambda f: write_json(f'{f}/x', 1)):\n"
        "    try: work(sys.argv[1])\n"
        "    except InputError as error: print(error)\n"
    )
    try:
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "closed")], capture_output=True, text=True, check=False
        )
        assert done.stdout.count("Permission denied") == 3, done.stdout + done.stderr
    finally:
        (tmp_path / "closed").chmod(0o700)
