"""Texts to evaluate on: read documents, hand each out as one passage of tokens."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from grace_opt.errors import InputError
from grace_opt.models.packaged_file import short
from grace_opt.models.texts import decoded, read_text, token_windows
from grace_opt.reading import parsed

TOPIC_CHARACTERS = 12_000  # of a joined document of topics: above 2304 tokens
DATASETS = {"longbench": "Xnhyacinth/LongBench", "ruler": "simonjegou/ruler"}  # hub copies that need no loading script


@dataclass(frozen=True)
class Document:
    """A text and its name. One with ``cut`` may be cut into several passages: it is a text without documents."""

    name: str
    text: str
    cut: bool = False


@dataclass(frozen=True)
class Passages:
    """``ids``: token ids, ``prefix + scored`` in each; ``names``: where each is from; documents that were too short."""

    ids: list[list[int]]
    names: list[str]
    prefix: int
    scored: int
    too_short: int


def read_documents(source: str | Path | None) -> list[Document]:
    """The documents of a source.

    ``source`` is a folder (each ``*.txt`` file in it is a document, in the order of their names), a ``.jsonl`` file
    (a document a line: its field "text", named by "title" or "id"), any other UTF-8 file or "-" for standard input
    (one text, which may be cut), or None for Python's own documentation. Raises InputError if it cannot be read, is
    not UTF-8, or holds no document; a bad line of a ``.jsonl`` file is named.
    """
    if source is None:
        return pydoc_documents()
    path = Path(source)
    if os.path.isdir(source):
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"{path} holds no .txt file; give a folder of .txt files, a .jsonl file or a text file")
        return [Document(file.stem, read_text(str(file))) for file in files]
    if path.suffix == ".jsonl":
        documents = []
        for number, row in _rows(path):
            name = row.get("title") or row.get("id") or f"{path.stem}:{number}"
            documents.append(Document(str(name), text_field(row, "text", f"line {number} of {path}")))
        return documents
    return [Document(path.stem, read_text(str(source)), cut=True)]


def pydoc_documents() -> list[Document]:
    """Python's own documentation: its topics by name, neighbours joined until they are 12,000 characters long.

    About 20 documents; which ones depends on the version of Python.
    """
    from pydoc_data.topics import topics

    documents: list[Document] = []
    names: list[str] = []
    text = ""
    for name in sorted(topics):
        names.append(name)
        text += f"{topics[name].strip()}\n\n"
        if len(text) >= TOPIC_CHARACTERS:
            documents.append(Document(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", text))
            names, text = [], ""
    return documents  # what is left over is too short


def load_dataset_documents(name: str, split: str, local: Path | None = None) -> list[Document]:
    """The contexts of ``longbench`` or ``ruler``, each with its question, as documents. Answers are not scored.

    ``split`` is a LongBench task (``narrativeqa``, ``gov_report``, ...), or a RULER length (``4096``) or, in a local
    copy as RULER's own generator writes it, a task (``niah_single_2``). ``local`` is a ``.jsonl`` file, or a folder
    with ``SPLIT.jsonl`` or ``SPLIT/validation.jsonl``; without it the dataset comes from the Hugging Face hub, by the
    package ``datasets``. Raises InputError if the dataset, the package, the hub or a field is missing.
    """
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; use one of {', '.join(DATASETS)}")
    documents = []
    for number, row in dataset_rows(name, split, local):
        where = f"row {number} of {name} {split}"
        # LongBench has context and input, RULER's generator input alone, RULER on the hub context and question.
        parts = [text_field(row, field, where) for field in ("context", "input", "question") if row.get(field)]
        if not parts:
            raise InputError(f"{where} has no context and no input; give a copy in the format of {name}")
        documents.append(Document(str(row.get("_id", f"{split}:{row.get('index', number)}")), "\n\n".join(parts)))
    return documents


def dataset_rows(name: str, split: str, local: Path | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number, from 1, and the fields of every row of a dataset, from where `load_dataset_documents` says."""
    return _hub_rows(name, split) if local is None else _rows(local_file(local, split))


def check_counts(length: int | None, scored: int, prompts: int | None) -> None:
    """Raise InputError for numbers that no text could give; None: not said."""
    given = {"length": length, "scored tokens": scored, "prompts": prompts}
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def passages(
    documents: Iterable[Document], tokenizer: Any, prefix: int, scored: int, most: int | None = None
) -> Passages:
    """The beginning of every document that is long enough, as ``prefix + scored`` token ids, ``most`` at the most.

    Passages begin with the tokenizer's BOS if it uses one. A document with ``cut`` gives consecutive passages that do
    not overlap, until ``most`` or its end. Documents after the last one needed are not looked at. Raises InputError if
    no document is long enough, which also says how long the longest is.
    """
    check_counts(prefix, scored, most)
    length = prefix + scored
    ids: list[list[int]] = []
    names: list[str] = []
    too_short = longest = 0
    for document in documents:
        if most is not None and len(ids) == most:
            break
        wanted = 1 if not document.cut else None if most is None else most - len(ids)
        found = list(islice(_windows(document, tokenizer, length), wanted))
        if not found:
            too_short += 1
            longest = max(longest, len(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]))
        ids += found
        names += [f"{document.name}:{i}" for i in range(len(found))] if document.cut else [document.name] * len(found)
    if not ids and not too_short:
        raise InputError("there is no document to evaluate on; give a folder or file that holds some")
    if not ids:
        raise InputError(
            f"none of {too_short} documents has {length} tokens ({prefix} of the prompt, {scored} scored), the longest "
            f"has {longest}; give longer documents or a smaller length"
        )
    return Passages(ids, names, prefix, scored, too_short)


def _windows(document: Document, tokenizer: Any, length: int) -> Iterator[list[int]]:
    pieces = decoded(io.StringIO(document.text), document.name)
    try:
        # As many tokens as the text could ever give: islice ends it.
        yield from token_windows(pieces, tokenizer, length * (len(document.text) + 1), length)
    except InputError:
        return  # shorter than one window


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the object of every line of a .jsonl file that is not blank."""
    lines = read_text(str(path)).removeprefix("\ufeff").split("\n")  # U+2028 may stand in a string
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line, strict=False)
        except InputError as error:
            raise InputError(f"line {number} of {path} is not JSON ({error}); write one JSON object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"line {number} of {path} is not a JSON object; write one JSON object a line")
        empty = False
        yield number, row
    if empty:
        raise InputError(f"{path} holds no document; write one JSON object a line")


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must be a string of Unicode; raises InputError with ``where`` in it."""
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f'{where} has no string field "{field}"; every line needs one')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f'{where} holds half of a surrogate pair in "{field}"; mend its \\u escape') from None
    return value


def local_file(local: Path, split: str) -> Path:
    """The file of a split in a local copy: the file itself, or in the folder. Raises InputError if there is none."""
    candidates = [local] if not os.path.isdir(local) else [local / f"{split}.jsonl", local / split / "validation.jsonl"]
    for path in candidates:
        if os.path.isfile(path):
            return path
    raise InputError(f"no such file: {' or '.join(map(str, candidates))}; give a .jsonl file or the folder it lies in")


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"{name} needs the package datasets; install it (pip install datasets) or give a local copy"
        ) from None
    if int(str(getattr(datasets, "__version__", "4")).partition(".")[0]) < 4:
        raise InputError("datasets before 4 runs code of the hub; install a later one (pip install 'datasets>=4')")
    try:
        rows = datasets.load_dataset(DATASETS[name], split, split="test")
    except Exception as error:  # no connection, no such split, a changed repository: almost any type
        raise InputError(
            f"cannot load {split} of {name} from the hub: {short(error)}; "
            "check the split and the connection, or give a local copy"
        ) from error
    yield from enumerate(map(dict, rows), start=1)
