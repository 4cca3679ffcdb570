"""What is compressed in a layer, and how it is named: the keys or the values of one KV head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from grace_opt.errors import InputError

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")

_NAME = re.compile(r"layers\.([0-9]{1,9})\.kv_heads\.([0-9]{1,9})\.(key|value)")


@dataclass(frozen=True, order=True)
class HeadName:
    """The keys or the values of one KV head of one layer; as text, ``layers.3.kv_heads.1.key``."""

    layer: int
    kv_head: int
    kind: Kind

    def __str__(self) -> str:
        return f"layers.{self.layer}.kv_heads.{self.kv_head}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> HeadName:
        """The inverse of ``str``. Raises InputError."""
        found = cls.match(text)
        if found is None:
            raise InputError(f"{text!r} names no head; heads are named like layers.3.kv_heads.1.key")
        return found

    @classmethod
    def match(cls, text: str) -> HeadName | None:
        """As `parse`; None for a text that names no head."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        layer, kv_head, kind = found.groups()
        return cls(int(layer), int(kv_head), "key" if kind == "key" else "value")
