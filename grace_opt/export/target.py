"""What an export target does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grace_opt.compression.plugins import Table

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask


class Target(ABC):
    """A runtime that a mask is translated for.

    Attributes:
        name: in `TARGETS` and on the command line.
        expresses: what it can run, in a sentence.
        tested: releases of the runtime that its tests run.
    """

    name: ClassVar[str]
    expresses: ClassVar[str]
    tested: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def supports(self, mask: KVMask, config: Any) -> bool | str:
        """True, or the sentence that says which part of the mask's plan it cannot express, before any work."""

    @abstractmethod
    def export(self, mask: KVMask, model: Any, folder: Path) -> None:
        """Write what the runtime reads. Raises InputError if `supports` would not be True."""


#: the targets by name; none yet. The entry-point group is ``grace_opt.targets``
TARGETS: Table[type[Target]] = Table("target", "grace_opt.targets", {})
