"""Documents and passages: every kind of source, what is too short, and what is said about bad ones."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import (
    DATASETS,
    TOPIC_CHARACTERS,
    Document,
    load_dataset_documents,
    passages,
    read_documents,
)
from tests.support import ROOT

TEXTS = ROOT / "benchmarks" / "texts.py"


class Words:
    """A tokenizer of words: the n-th new word is token n."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [self.vocabulary.setdefault(word, 1 + len(self.vocabulary)) for word in text.split()]
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": bos + ids}


def words(count: int, word: str = "w") -> str:
    return " ".join(f"{word}{i}" for i in range(count))


# Sources


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second é", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no")
    assert read_documents(tmp_path) == [Document("a", "first"), Document("b", "second é")]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "articles.jsonl"
    rows = [{"title": "Alpha", "text": "one\u2028two"}, {"id": 7, "text": "b"}, {"text": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\ufeff" + lines[0] + "\r\n\n" + "\n".join(lines[1:]), encoding="utf-8")
    assert read_documents(str(path)) == [
        Document("Alpha", "one\u2028two"),
        Document("7", "b"),
        Document("articles:4", "c"),
    ]


def test_a_plain_text_may_be_cut(tmp_path: Path) -> None:
    (tmp_path / "book.text").write_text("Call me Ishmael.", encoding="utf-8")
    assert read_documents(tmp_path / "book.text") == [Document("book", "Call me Ishmael.", cut=True)]


def test_pythons_documentation() -> None:
    documents = read_documents(None)
    assert len(documents) >= 12
    assert len({document.name for document in documents}) == len(documents)
    assert min(len(document.text) for document in documents) >= TOPIC_CHARACTERS
    assert not any(document.cut for document in documents)
    assert documents == read_documents(None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "unfinished', r"line 2 of .*bad\.jsonl is not JSON"),
        ("[1, 2]", r"line 2 of .*bad\.jsonl is not a JSON object"),
        ('{"body": "b"}', r'line 2 of .*bad\.jsonl has no string field "text"'),
        ('{"text": 3}', r'line 2 of .*bad\.jsonl has no string field "text"'),
        (r'{"text": "\ud800"}', r"line 2 of .*bad\.jsonl holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=said) as caught:
        read_documents(tmp_path / "bad.jsonl")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.txt file"):
        read_documents(tmp_path)
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes("é".encode("latin-1"))
        with pytest.raises(InputError, match=f"{name} is not UTF-8 text"):
            read_documents(tmp_path / name)
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text"):
        read_documents(tmp_path)
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(InputError, match="no such text file"):
            read_documents(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no document"):
        read_documents(tmp_path / "empty.jsonl")


# Passages


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    prefix=st.integers(1, 9),
    scored=st.integers(1, 9),
    most=st.none() | st.integers(1, 4),
    bos=st.sampled_from([None, 0]),
)
def test_one_passage_from_the_beginning_of_every_long_document(
    sizes: list[int], prefix: int, scored: int, most: int | None, bos: int | None
) -> None:
    tokenizer = Words(bos)
    documents = [Document(f"d{i}", words(size, f"d{i}w")) for i, size in enumerate(sizes)]
    begin = [] if bos is None else [bos]
    every = [begin + tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    expected = [ids[: prefix + scored] for ids in every if len(ids) >= prefix + scored][:most]
    if not expected:
        with pytest.raises(InputError, match=f"none of {len(sizes)} documents has {prefix + scored} tokens"):
            passages(documents, tokenizer, prefix, scored, most)
        return
    result = passages(documents, tokenizer, prefix, scored, most)
    assert result.ids == expected
    long = [i for i, ids in enumerate(every) if len(ids) >= prefix + scored][: len(expected)]
    assert result.names == [f"d{i}" for i in long]
    looked_at = len(sizes) if most is None or len(expected) < most else long[-1] + 1
    assert result.too_short == looked_at - len(expected)


@given(
    size=st.integers(0, 60),
    length=st.integers(2, 20),
    most=st.none() | st.integers(1, 4),
    bos=st.sampled_from([None, 0]),
)
def test_a_plain_text_is_cut_into_passages_that_do_not_overlap(
    size: int, length: int, most: int | None, bos: int | None
) -> None:
    tokenizer = Words(bos)
    document = Document("book", words(size), cut=True)
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    begin = [] if bos is None else [bos]
    body = length - len(begin)
    expected = [begin + ids[i : i + body] for i in range(0, size - body + 1, body)][:most]
    if not expected:
        with pytest.raises(InputError, match="give longer documents or a smaller length"):
            passages([document], tokenizer, 1, length - 1, most)
        return
    result = passages([document], tokenizer, 1, length - 1, most)
    assert result.ids == expected
    assert result.names == [f"book:{i}" for i in range(len(expected))]
    assert result.too_short == 0


def test_the_longest_is_named_when_all_are_too_short() -> None:
    documents = [Document("a", words(5)), Document("b", words(9)), Document("c", "")]
    with pytest.raises(InputError, match=r"none of 3 documents has 12 tokens.*the longest has 9"):
        passages(documents, Words(), 8, 4)
    with pytest.raises(InputError, match="at least 1"):
        passages(documents, Words(), 0, 4)
    with pytest.raises(InputError, match="there is no document"):
        passages([], Words(), 8, 4)


def test_a_text_longer_than_a_piece_loses_nothing() -> None:
    document = Document("book", words(30_000), cut=True)
    tokenizer = Words()
    result = passages([document], tokenizer, 900, 100)
    ids = [token for passage in result.ids for token in passage]
    assert ids == tokenizer(document.text)["input_ids"]


# Datasets

LONGBENCH = {
    "input": "Who?",
    "context": "A long story.",
    "answers": ["Ann"],
    "length": 3,
    "dataset": "narrativeqa",
    "language": "en",
    "all_classes": None,
    "_id": "0a1b",
}
RULER = {"index": 5, "input": "Some special numbers are hidden. What is it?", "outputs": ["48213"], "length": 4096}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_longbench_from_a_local_copy(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "narrativeqa.jsonl", LONGBENCH, LONGBENCH | {"input": "", "_id": "2c"})
    expected = [Document("0a1b", "A long story.\n\nWho?"), Document("2c", "A long story.")]
    assert load_dataset_documents("longbench", "narrativeqa", tmp_path) == expected
    assert load_dataset_documents("longbench", "narrativeqa", file) == expected


def test_ruler_from_a_local_copy(tmp_path: Path) -> None:
    write_rows(tmp_path / "niah_single_2" / "validation.jsonl", RULER)
    expected = [Document("niah_single_2:5", RULER["input"])]
    assert load_dataset_documents("ruler", "niah_single_2", tmp_path) == expected


def test_what_is_missing_from_a_local_copy_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown dataset 'squad'; use one of longbench, ruler"):
        load_dataset_documents("squad", "test", tmp_path)
    with pytest.raises(InputError, match=r"no such file: .*qasper\.jsonl or .*validation\.jsonl"):
        load_dataset_documents("longbench", "qasper", tmp_path)
    file = write_rows(tmp_path / "odd.jsonl", LONGBENCH, {"prompt": "x"})
    with pytest.raises(InputError, match="row 2 of longbench odd has no context and no input"):
        load_dataset_documents("longbench", "odd", file)
    file = write_rows(tmp_path / "odd.jsonl", {"context": ["x"]})
    with pytest.raises(InputError, match='row 1 of longbench odd has no string field "context"'):
        load_dataset_documents("longbench", "odd", file)


def test_the_hub_by_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        if name == "none":
            raise ConnectionError("Couldn't reach the hub. And more.\nAnd a traceback")
        return [{"context": "C", "question": "Q?", "answer_prefix": "A", "answer": ["1"], "task": "niah"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_dataset_documents("ruler", "4096") == [Document("4096:1", "C\n\nQ?")]
    assert asked == [(DATASETS["ruler"], "4096", "test")]
    with pytest.raises(InputError, match="cannot load none of ruler from the hub: Couldn't reach the hub;") as caught:
        load_dataset_documents("ruler", "none")
    assert "\n" not in str(caught.value)


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"longbench needs the package datasets; install it .* or give a local copy"):
        load_dataset_documents("longbench", "qasper")


# Wikitext; the script is not part of the wheel, and the tests also run without the checkout

if TEXTS.is_file():

    def script() -> ModuleType:
        spec = importlib.util.spec_from_file_location("benchmarks_texts", TEXTS)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    WIKITEXT = """{{Infobox country|name=Atlantis|area={{convert|1|km2}}}}
[[File:Atlantis.jpg|thumb|A [[map]] of it]]
'''Atlantis''' ({{IPAc-en|ə}}; {{lang|grc|Ἀτλαντίς}}) is a [[Fiction|fictional]] island<ref name="a">{{cite|x}}</ref> of
[[Plato]], {{convert|1300|mi|km}} wide &amp; {{convert|10|to|20|km}} long.<!-- really? --><ref name="a" />

==History==
{{Main|History of Atlantis}}
It ''sank'' ({{citation needed}}) {{as of|2014|lc=y}}, [http://example.org says Plato].
{| class="wikitable"
! Year !! People
|-
| 1 || 2
|}
* one [[island]]
* two islands

===Empty===
{{Empty section}}

==See also==
* [[Lemuria]]
===Deeper===
Also left out.

==Legacy==
Unclosed ''emphasis.
[[Category:Islands]]
[[de:Atlantis]]
"""

    def test_wikitext_becomes_prose() -> None:
        lines = [
            "Atlantis (Ἀτλαντίς) is a fictional island of",
            "Plato, 1300 mi wide & 10 to 20 km long.",
            "",
            "History",
            "",
            "It sank as of 2014, says Plato.",
            "",
            "one island",
            "two islands",
            "",
            "Legacy",
            "",
            "Unclosed emphasis.",
        ]
        assert script().prose(WIKITEXT).split("\n") == lines
