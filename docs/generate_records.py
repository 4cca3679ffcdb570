"""Writes the tables of the records' fields into the pages, from `grace_opt.records`.

    python docs/generate_records.py

A page says where: the table between ``<!-- fields: NAME -->`` and ``<!-- end of fields -->`` has the fields that the
record NAME adds to the one that it extends. A test compares the tables with what this would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, get_args, get_type_hints

from grace_opt import records

PAGES = [Path(__file__).with_name(name) for name in ("formats.md", "compare.md", "evaluation.md")]
MARKED = re.compile(r"(<!-- fields: (\w+) -->\n)(.*?)(<!-- end of fields -->)", re.DOTALL)


def render(page: str) -> str:
    """A page's text with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(getattr(records, found[2]))}\n{found[4]}", page)


def table(model: type) -> str:
    """The Markdown table of the fields that a record adds."""
    added = records.added(model)
    rows = ["| field | unit or values | meaning |", "|---|---|---|"]
    for name, unit, meaning in described(model):
        if name.partition(".")[0] in added:
            rows.append(f"| `{name}` | {unit}{' ' if unit else ''}| {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def described(model: type) -> Iterator[tuple[str, str, str]]:
    """Name, unit or values, and meaning of each field; of a field that has fields, those."""
    hints = get_type_hints(model)
    for each in fields(model):
        classes = parts(hints[each.name])
        nested = [part for part in classes if is_dataclass(part) and part is not records.Interval]
        if nested:
            yield from ((f"{each.name}.{name}", unit, meaning) for name, unit, meaning in described(nested[0]))
            continue
        values = [f"`{value}`" for part in classes if issubclass(part, StrEnum) for value in part]
        yield each.name, ", ".join(values) or each.metadata["unit"], each.metadata["description"]


def parts(hint: Any) -> list[type]:
    """The classes of ``A | B``."""
    found = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return [part for part in found if isinstance(part, type) and not isinstance(part, GenericAlias)]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
