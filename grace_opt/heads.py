"""What is compressed in a layer, and how it is named: the keys or the values of one KV head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from grace_opt.errors import InputError, shown

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")

#: What a model has at most, far above any that is known: numbers of a file beyond are damage, and none becomes a size.
LAYERS, HEADS, CHANNELS = 8192, 1024, 4096
HEADS_IN_ALL, CHANNELS_IN_ALL = 1 << 16, 1 << 24  #: of all layers

_NAME = re.compile(r"layers\.([0-9]+)\.kv_heads\.([0-9]+)\.(key|value)")


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
        """As `parse`; None for a text that names no head. Raises InputError for numbers that no model has."""
        found = _NAME.fullmatch(text)
        if found is None:
            return None
        *numbers, kind = found.groups()
        layer, kv_head = (int(each[:10]) for each in numbers)
        head = cls(layer, kv_head, "key" if kind == "key" else "value")
        if str(head) != text:
            raise InputError(
                f"{shown(text, 100)!r} names no head of a model; its numbers are beyond any, or begin with a zero"
            )
        return head


def check_geometry(what: str, layers: int, kv_heads: int, channels: int) -> None:
    """Raise InputError for more than any model has, before anything is made of these numbers of a file."""
    for number, most, name in (
        (layers, LAYERS, "layers"),
        (kv_heads, HEADS, "KV heads"),
        (channels, CHANNELS, "channels of a head"),
        (layers * kv_heads, HEADS_IN_ALL, "KV heads in all layers"),
        (layers * kv_heads * channels, CHANNELS_IN_ALL, "channels in all layers"),
    ):
        if not 0 <= number <= most:
            raise InputError(f"{what} says that the model has {number} {name}, and none has over {most}; make it again")
