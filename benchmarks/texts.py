"""Make the evaluation texts: English Wikipedia articles and Python's documentation, one JSON object a line.

    python benchmarks/texts.py [-o FOLDER]

Needs the dev extra (mwparserfromhell). The articles (CC BY-SA, https://en.wikipedia.org) lie in the test data of the
package gensim, which is fetched with your own pip on first use; the file is kept in the cache beside the models.
"""

# ruff: noqa: RUF001  (the dashes of typeset text are meant)
from __future__ import annotations

import bz2
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import mwparserfromhell
import typer
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink
from rich.progress import Progress

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import pydoc_documents
from grace_opt.files import write_text
from grace_opt.models.load import cache_folder
from grace_opt.models.packaged_file import PackagedFile, progress_bars

ARTICLES = PackagedFile(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    nbytes=1_695_871,
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    wheel_bytes=27_809_988,
    what="the Wikipedia articles",
    otherwise="evaluate on texts of your own",
)
WIKIPEDIA_SHA256 = "7a3f04ed44975ff7a0427eb522668ebef191224e29e356326d0b8fd3d1996137"
SHORTEST = 4000  # characters: what is shorter is mostly a stub or a list of links

# What is not prose, although it looks like it.
LEFT_OUT = {
    *("references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes", "citations"),
    *("sources", "works cited", "notes and references", "references and notes", "gallery", "general references"),
    *("published works", "filmography", "discography", "primary sources", "secondary sources", "other uses"),
}
NAMESPACES = {"file", "image", "category", "media", "template", "portal", "wikipedia"}
HIDDEN_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "source", "syntaxhighlight", "hr"}

# Templates inside sentences, and which of their parameters a reader sees; all others are boxes and notes.
FIRST = {"abbr", "angbr", "angle bracket", "big", "blockquote", "cquote", "flag", "ipa", "nihongo", "nobold", "nobr"}
FIRST |= {"nowrap", "num", "quote", "railgauge", "sc", "script", "ship", "small", "smaller", "val", "vanchor"}
FIRST |= {"visible anchor"}
LAST = {"lang", "transl", "transliteration", "rtl-lang", "ill", "section link"}
FIXED = {"'s": "'s", "nbsp": " ", "snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdashb": "—", "mdash": "—"}
JOINERS = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × ", "to(-)": " to "}


def prose(wikitext: str) -> str:
    """The text that a reader sees in the article's body: paragraphs, list items and headings, a line each."""
    left_out = 7  # the level below which sections belong to one that is left out
    parts = []
    for section in mwparserfromhell.parse(wikitext).get_sections(flat=True, include_lead=True):
        nodes = list(section.nodes)
        title = ""
        if nodes and isinstance(nodes[0], Heading):
            heading = nodes.pop(0)
            title = tidy(shown(heading.title))
            if heading.level > left_out:
                continue
            left_out = heading.level if title.lower() in LEFT_OUT else 7
            if left_out < 7:
                continue
        if body := tidy("".join(map(shown, nodes))):
            parts.append(f"{title}\n\n{body}" if title else body)
    return "\n\n".join(parts)


def shown(node: Any) -> str:
    """What a node of the parsed wikitext, or several of them, show to a reader."""
    match node:
        case None:
            return ""
        case mwparserfromhell.wikicode.Wikicode():
            return "".join(map(shown, node.nodes))
        case Text():
            return str(node.value)
        case HTMLEntity():
            return str(node.normalize())
        case Wikilink():
            space, colon, _ = str(node.title).partition(":")
            if colon and (space.strip().lower() in NAMESPACES or (node.text is None and space.islower())):
                return ""  # a picture, a category, the same article in another language
            return shown(node.title if node.text is None else node.text).removeprefix(":")
        case ExternalLink():
            return shown(node.title)
        case Tag():
            return tag(node)
        case Template():
            return template(node)
    return ""  # comments, arguments


def tag(node: Tag) -> str:
    name = str(node.tag).strip().lower()
    if name in HIDDEN_TAGS:
        return ""
    if name == "math":
        return str(node.contents).strip()
    if name in {"br", "dd", "dt"}:
        return " "
    return shown(node.contents)  # emphasis, list marks (which have no contents), sub and sup, span, div, ...


def template(node: Template) -> str:
    name = str(node.name).strip().lower().replace("_", " ")
    values = [tidy(shown(parameter.value)) for parameter in node.params if not parameter.showkey]
    if name in FIXED:
        return FIXED[name]
    if name == "as of" and values:
        return f"{'as' if node.has('lc') else 'As'} of {values[0]}"
    if name in {"circa", "c."}:
        return f"c. {values[0]}" if values else "c."
    if name in {"chem", "chem2"}:
        return "".join(values)
    if name in {"frac", "fraction"}:
        return "/".join(["1", *values] if len(values) == 1 else values[-2:])
    if name in {"convert", "cvt"}:
        return measure(values)
    if name in LAST and values:
        return values[-1]
    if (name in FIRST or name.startswith("lang-")) and values:
        return values[0]
    return ""


def measure(values: list[str]) -> str:
    """The first quantity of a conversion: numbers, joined by a word or a dash, up to the unit."""
    text = ""
    for value in values:
        if value in JOINERS:
            text += JOINERS[value]
        elif value[:1] in tuple("0123456789-−.+"):
            text += value
        else:
            return f"{text} {value}"
    return text


def tidy(text: str) -> str:
    """Without mark-up that was never closed, and without the holes that notes and boxes leave."""
    text = re.sub(r"<ref\b[^>]*>.*?</ref>|\[\[File:.*|__[A-Z]+__|^[|!{].*", "", text, flags=re.MULTILINE)
    text = re.sub(r"'{2,}", "", re.sub(r"'''(?=s\b)", "'", text))
    text = text.replace("\N{NO-BREAK SPACE}", " ").replace("\u200b", "")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"\((?:[ ,;:/–-]|\bor\b)*\)", "", text)
    text = re.sub(r"\((?: *[,;:])+ *", "(", text)
    text = re.sub(r"(?: *[,;:])+ *\)", ")", text)
    text = re.sub(r"\( +", "(", text)
    text = re.sub(r" +([,.;:)](?:\s|$))", r"\1", re.sub(r" +", " ", text))
    lines = [line.strip() for line in text.split("\n")]
    lines = [line if re.search(r"\w", line) else "" for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def articles(dump: bytes, progress: Progress) -> Iterator[dict[str, str]]:
    """Title and text of every article of a MediaWiki dump that is long enough, in its order."""
    pages = ElementTree.fromstring(dump).findall("{*}page")
    for page in progress.track(pages, description="stripping wikitext"):
        if page.findtext("{*}ns") != "0" or page.find("{*}redirect") is not None:
            continue
        text = prose(page.findtext("{*}revision/{*}text") or "")
        if len(text) >= SHORTEST:
            yield {"title": page.findtext("{*}title") or "", "text": text}


def cached_dump(progress: Progress) -> bytes:
    """The Wikipedia dump, unpacked; fetched if it is not in the cache, or not whole."""
    path = cache_folder() / "texts" / Path(ARTICLES.member).name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != ARTICLES.sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".texts-", dir=path.parent) as work:
            os.replace(ARTICLES.fetch(Path(work), progress), path)
    return bz2.decompress(path.read_bytes())


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: texts/ in the cache.")] = None,
) -> None:
    """Write wikipedia.jsonl and pydoc.jsonl, and print their hashes."""
    folder = output or cache_folder() / "texts"
    try:
        with progress_bars() as progress:
            wikipedia = list(articles(cached_dump(progress), progress))
        pydoc = [{"title": document.name, "text": document.text} for document in pydoc_documents()]
        for name, rows, expected in (("wikipedia", wikipedia, WIKIPEDIA_SHA256), ("pydoc", pydoc, None)):
            text = json_lines(rows)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if expected not in {None, digest}:
                raise InputError(f"{name}.jsonl came out as {digest}, not {expected}; install mwparserfromhell==0.7.2")
            write_text(folder / f"{name}.jsonl", text)
            characters = sum(len(row["text"]) for row in rows)
            typer.echo(f"{digest}  {folder / name}.jsonl  {len(rows)} documents, {characters} characters")
    except (InputError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
