"""Tables of what can be named: built-ins, what a program registers, and entry points of other packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from grace_opt.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from grace_opt.compression.codec import Codec
    from grace_opt.compression.tokens.base import TokenPolicy

Item = TypeVar("Item", bound=type)


class Table(Generic[Item]):
    """Name -> class, imported when it is asked for.

    ``what`` names the things in messages; ``group`` is the entry-point group of other packages' ones; ``built_in`` maps
    a name to "module:Class". ``GRACE_OPT_PLUGINS`` restricts entry points as it does for solvers.
    """

    def __init__(self, what: str, group: str, built_in: Mapping[str, str]) -> None:
        self.what, self.group = what, group
        self._known: dict[str, Any] = dict(built_in)

    def register(self, item: Item) -> Item:
        """Add a class under its ``name``, as a decorator too. Raises InputError if another class has the name."""
        name: str = item.name  # type: ignore[attr-defined]
        known = self._known.setdefault(name, item)
        if known is not item and known != f"{item.__module__}:{item.__qualname__}":
            raise InputError(f"the {self.what} {name!r} is taken by {known}; choose another name")
        return item

    def __getitem__(self, name: str) -> Item:
        """The class of a name. Raises InputError for an unknown one, with the nearest known."""
        found = self._known.get(name) or self._plugins().get(name)
        if found is None:
            raise InputError(f"unknown {self.what} {name!r}{did_you_mean(name, list(self))}")
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise InputError(
                    f"the {self.what} {name!r} cannot be loaded ({error}); reinstall its package"
                ) from None
        return found  # type: ignore[no-any-return]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._plugins()

    def __iter__(self) -> Iterator[str]:
        return iter([*self._known, *(name for name in self._plugins() if name not in self._known)])

    def _plugins(self) -> dict[str, str]:
        chosen = os.environ.get("GRACE_OPT_PLUGINS")
        wanted = None if chosen is None else {part.strip() for part in chosen.split(",") if part.strip()}
        points = sorted(importlib.metadata.entry_points(group=self.group), key=lambda point: (point.name, point.value))
        return {point.name: point.value for point in points if wanted is None or point.name in wanted}


#: the codecs by name; `CODECS.register` adds one, as does the entry-point group ``grace_opt.codecs``
CODECS: Table[type[Codec]] = Table(
    "codec",
    "grace_opt.codecs",
    {
        "whole": "grace_opt.compression.codec:Whole",
        "channels": "grace_opt.compression.channels:Channels",
        "lowrank": "grace_opt.compression.lowrank:LowRank",
        "cskv": "grace_opt.compression.cskv:Cskv",
        "integers": "grace_opt.compression.integers:Integers",
    },
)

#: the policies by name; `POLICIES.register` adds one, as does the entry-point group ``grace_opt.token_policies``
POLICIES: Table[type[TokenPolicy]] = Table(
    "token policy",
    "grace_opt.token_policies",
    {
        name: f"grace_opt.compression.tokens.{where}"
        for name, where in {
            "streaming": "streaming:Streaming",
            "snapkv": "snapkv:SnapKV",
            "pyramidkv": "pyramidkv:PyramidKV",
            "adakv": "adakv:AdaKV",
            "h2o": "h2o:H2O",
            "tova": "tova:Tova",
            "knorm": "knorm:Knorm",
            "keydiff": "keydiff:KeyDiff",
            "expected-attention": "expected_attention:ExpectedAttention",
        }.items()
    },
)
