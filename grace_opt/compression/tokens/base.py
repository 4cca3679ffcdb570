"""What a token policy does: it says which tier each token of a prompt goes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from grace_opt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.graphs.observed import Observed


class Tier(IntEnum):
    """What becomes of a token."""

    DROPPED = 0  #: nothing of it is held
    COMPRESSED = 1  #: as the layer's codecs store it
    WHOLE = 2  #: with its residual


@dataclass(frozen=True)
class TokenPolicy(ABC):
    """Chooses among the old tokens of one row's prompt, in one layer.

    A subclass is a frozen dataclass; its fields are parameters that JSON can hold. Sinks and the recent window are
    whole, whatever it says.

    Attributes:
        name: in `POLICIES` and in mask files.
        slides: whether tokens that leave the recent window later are dropped; if not, they are compressed. Only where
            generated tokens are pruned.
        whole: whether the tokens that stay are whole, rather than compressed.
    """

    name: ClassVar[str]
    slides: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    @abstractmethod
    def tiers(self, seen: Observed, share: float) -> Tensor:
        """int8[T] of `Tier`, a tier for each token of ``seen.keys`` [H, T, n].

        ``share``: the fraction of the old tokens (``seen.prunable``) that may stay.
        """

    def parameters(self) -> dict[str, Any]:
        """The fields, for files."""
        return asdict(self)


@dataclass(frozen=True)
class TokenRule:
    """A policy and the share of old tokens that stay."""

    policy: TokenPolicy
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"the share of old tokens that stay must be from 0 to 1, got {self.share}")
