"""Calibration text: read it in pieces, hand it out as windows of tokens."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from grace_opt.errors import InputError
from grace_opt.reading import opened

DEFAULT_TEXT = "pydoc_data.topics"
_LAYOUT = re.compile(r"^[\s>.*=~#-]", re.MULTILINE)  # lines that are no running text
_PROSE_MODULES = (
    *("statistics", "argparse", "copy", "http.cookies", "heapq", "urllib.parse", "doctest", "typing", "random", "pdb"),
    *("decimal", "threading", "logging", "subprocess", "csv", "pickletools", "difflib", "optparse", "sched", "secrets"),
    *("socketserver", "string", "textwrap", "tokenize", "turtle", "uuid", "cmd", "configparser", "fractions", "json"),
    *("http.client", "http.cookiejar", "contextlib", "enum", "functools", "inspect", "ipaddress", "mailbox", "pathlib"),
    *("tarfile", "zipfile", "unittest", "email.message", "email.policy", "multiprocessing", "codecs", "collections"),
)
TEXT_LIMIT = 1 << 28  #: characters of a text that is held as a whole
_PIECE = 1 << 16  # characters tokenised at a time: memory stays flat however long the text


def read_pieces(source: str | None) -> Iterator[str]:
    """The text in pieces of about 64k characters that end at white space.

    ``source`` is None for Python's own documentation (465,000 characters that every CPython carries), "-" for
    standard input, or the path of a UTF-8 file. Raises InputError if it cannot be read.
    """
    if source is None:
        from pydoc_data.topics import topics

        yield from _pieces(f"{topics[name]}\n" for name in sorted(topics))
    elif source == "-":
        if sys.stdin is None:
            raise InputError("there is no standard input to read; give a file")
        # Python itself would let bytes through that are not UTF-8.
        binary = getattr(sys.stdin, "buffer", None)
        stream = sys.stdin if binary is None else io.TextIOWrapper(binary, encoding="utf-8")
        yield from decoded(stream, "standard input")
    else:
        if os.path.isdir(source):
            raise InputError(f"no such text file: {source}; give a UTF-8 file, or - for standard input")
        with opened(source, "text file", stream=True) as file:
            yield from decoded(io.TextIOWrapper(file, encoding="utf-8"), source)


def read_text(source: str) -> str:
    """As `read_pieces`, all at once. Raises InputError also for more than `TEXT_LIMIT` characters."""
    pieces, size = [], 0
    for piece in read_pieces(source):
        pieces.append(piece)
        size += len(piece)
        if size > TEXT_LIMIT:
            raise InputError(f"{source} has more than {TEXT_LIMIT} characters, which is no text that can be read whole")
    return "".join(pieces)


def prose(modules: Iterable[str] = _PROSE_MODULES) -> Iterator[str]:
    """Prose that every CPython carries: paragraphs of modules' docstrings that hold neither code nor lists.

    About 80,000 characters from the modules that it reads by default; another source than `DEFAULT_TEXT`.
    """
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:  # turtle, where Python came without Tk
            continue
        members = [each for _, each in sorted(vars(module).items()) if getattr(each, "__module__", None) == name]
        for member in (module, *members):
            for paragraph in re.split(r"\n\s*\n", inspect.getdoc(member) or ""):
                text = " ".join(paragraph.split("\n"))
                plain = sum(character.isalpha() or character in " ,.'" for character in text)
                if _LAYOUT.search(paragraph) is None and len(text) >= 150 and plain > 0.95 * len(text):
                    yield f"{text}\n\n"


def token_windows(pieces: Iterable[str], tokenizer: Any, tokens: int, window: int) -> Iterator[list[int]]:
    """Windows of ``window`` token ids, up to ``tokens`` in all, each begun by the tokenizer's BOS if it uses one.

    Text is tokenised piece by piece, so a word at the seam of two pieces may be split in another way than in
    one go. Raises InputError if the text is empty or shorter than one window.
    """
    bos = bos_of(tokenizer)
    body = window - len(bos)
    if body < 1 or tokens < window:
        raise InputError(f"{tokens} tokens hold no window of {window}; ask for more tokens or a smaller window")
    buffer: list[int] = []
    given = 0
    for piece in pieces:
        buffer += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        start = 0
        while len(buffer) - start >= body:
            yield bos + buffer[start : start + body]
            start += body
            given += window
            if given + window > tokens:
                return
        del buffer[:start]
    if given == 0:
        if not buffer:
            raise InputError("the text is empty; give a text of at least one window")
        raise InputError(
            f"the text has {len(buffer)} tokens, fewer than one window of {window}; "
            "give a longer text or a smaller window"
        )


def bos_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def decoded(file: TextIO, name: str) -> Iterator[str]:
    try:
        yield from _pieces(iter(lambda: file.read(_PIECE), ""))
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from None


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks of any size, cut anew at white space so that no word is torn apart."""
    held = ""
    for block in blocks:
        held += block
        if len(held) < _PIECE:
            continue
        cut = 1 + max(held.rfind("\n"), held.rfind(" "))
        cut = cut or len(held)  # text without white space is cut anywhere, or it would all be held
        yield held[:cut]
        held = held[cut:]
    if held:
        yield held
