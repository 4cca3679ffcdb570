"""Options that say how much of the cache may stay."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from grace_opt.cli.options import option
from grace_opt.errors import InputError
from grace_opt.heads import KINDS, Kind

if TYPE_CHECKING:
    from grace_opt.compression.budget import Budget

SHARE = "held, with whole tokens, scales and read-outs, as a share of the uncompressed cache"
ValueRatioOption = Annotated[
    float | None, option("--value-ratio", help="The same for values, if the bundle has their graphs; as --ratio.")
]
BudgetSharesOption = Annotated[list[float] | None, option("--budget-share", help=f"Bytes {SHARE}; repeatable.")]
OF_RATIOS = "--value-ratio goes with --ratio; a budget in bytes is shared between keys and values"


@dataclasses.dataclass(frozen=True)
class BudgetOption:
    """How much may stay of the cache."""

    ratio: Annotated[
        float | None, option("--ratio", help="Fraction of the channels to prune, of each or of the average head.")
    ] = None
    value_ratio: ValueRatioOption = None
    budget_bytes: Annotated[
        float | None,
        option(
            "--budget-bytes",
            help="In place of ratios: bytes that an old token's keys and values may take in all layers, at 16 bits.",
        ),
    ] = None
    budget_share: Annotated[float | None, option("--budget-share", help=f"In place of ratios: bytes {SHARE}.")] = None
    budget_tokens: Annotated[
        int | None, option("--budget-tokens", help="Tokens of the cache that --budget-share is of; 8192 if left out.")
    ] = None

    def budget(self, kinds: tuple[Kind, ...] = KINDS) -> Budget:
        """The one that was given, of what may be pruned. Raises InputError for none, or several."""
        from grace_opt.compression.budget import Budget

        ratio = 0.0 if self.ratio is None and self.value_ratio is not None and "key" not in kinds else self.ratio
        if sum(each is not None for each in (ratio, self.budget_bytes, self.budget_share)) != 1:
            raise InputError("give either --ratio or --budget-bytes or --budget-share")
        if self.budget_tokens is not None and self.budget_share is None:
            raise InputError("--budget-tokens goes with --budget-share")
        if ratio is not None:
            return Budget(ratio, ratio if self.value_ratio is None else self.value_ratio)
        if self.value_ratio is not None:
            raise InputError(OF_RATIOS)
        asked = Budget(bytes_per_token=self.budget_bytes, share=self.budget_share, kinds=kinds)
        return asked if self.budget_tokens is None else replace(asked, tokens=self.budget_tokens)


@dataclasses.dataclass(frozen=True)
class BudgetOptions:
    """How much may stay of the cache: any number of budgets."""

    ratio: Annotated[
        list[float] | None,
        option("--ratio", help="Fraction of the channels to prune, of each or of the average head; repeatable."),
    ] = None
    value_ratio: ValueRatioOption = None
    budget_bytes: Annotated[
        list[float] | None,
        option(
            "--budget-bytes",
            help="Bytes that an old token's keys and values may take in all layers, at 16 bits; repeatable.",
        ),
    ] = None

    def budgets(self) -> list[float | Budget]:
        """All of them; a number is a ratio of keys and values alike. Raises InputError if there is none."""
        from grace_opt.compression.budget import Budget

        ratios, value_ratio = self.ratio or [], self.value_ratio
        if not ratios and not self.budget_bytes:
            raise InputError("give --ratio or --budget-bytes")
        if not ratios and value_ratio is not None:
            raise InputError(OF_RATIOS)
        checked = [Budget(ratio, ratio if value_ratio is None else value_ratio) for ratio in ratios]
        in_bytes = [Budget(bytes_per_token=most) for most in self.budget_bytes or []]
        return [*(ratios if value_ratio is None else checked), *in_bytes]
