"""What a token policy does: it says which tier each token of a prompt goes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from grace_opt.compression.plugins import POLICIES
from grace_opt.errors import InputError, did_you_mean

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
        per_head: whether each KV head holds tokens of its own.
    """

    name: ClassVar[str]
    slides: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    per_head: ClassVar[bool] = False

    @abstractmethod
    def tiers(self, seen: Observed, share: float) -> Tensor:
        """int8[T] of `Tier`, a tier for each token of ``seen.keys`` [H, T, n]; int8[H, T] of a policy ``per_head``.

        ``share``: the fraction of the old tokens (``seen.prunable``) that may stay, of the average head.
        """

    def layer_shares(self, share: float, layers: int) -> list[float]:
        """The share of each of the compressed layers, in order, so that they are ``share`` on average."""
        return [share] * layers

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

    def kept(self, seen: Observed) -> list[int] | None:
        """How many old tokens each KV head keeps; None where all keep the same."""
        if not self.policy.per_head:
            return None
        stay = self.policy.tiers(seen, self.share)[:, seen.prunable] != Tier.DROPPED
        return [int(each) for each in stay.sum(1)]


def policy_named(name: str, parameters: Mapping[str, Any]) -> TokenPolicy:
    """The policy of a name, with parameters as JSON or the command line have them. Raises InputError for wrong ones."""
    from pydantic import TypeAdapter, ValidationError

    policy = POLICIES[name]
    known = [each.name for each in fields(policy)]
    for each in parameters:
        if each not in known:
            raise InputError(f"token policy {name!r} has no option {each!r}{did_you_mean(each, known)}")
    try:
        made: TokenPolicy = TypeAdapter(policy).validate_python(dict(parameters))
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first.get("ctx", {}).get("error", first["msg"]))
        where = "".join(f", option {part!r}" for part in first["loc"])
        raise InputError(f"token policy {name!r}{where}: {message}") from None
    return made


def compressed(tiers: Tensor) -> Tensor | None:
    """int64: the compressed tokens of int8[T]; None if there are none, as later tokens alone will be then."""
    found = (tiers == Tier.COMPRESSED).nonzero()[:, 0]
    return found if len(found) else None
