"""What is evaluated: a method at a budget, or a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from grace_opt.compression.apply import apply
from grace_opt.compression.budget import Budget, ShareError
from grace_opt.compression.codec import bytes_of
from grace_opt.compression.mask import KVMask
from grace_opt.compression.method import Method
from grace_opt.compression.plan import CachePlan
from grace_opt.evaluate.capture import Captured
from grace_opt.evaluate.replay import narrow, replay
from grace_opt.files import json_text
from grace_opt.heads import KINDS, Kind
from grace_opt.runtime.cache import PrunedCache, cache_nbytes

Generated = Literal["keep", "prune"]


@dataclass(frozen=True, eq=False)
class Trial:
    """What is evaluated: a method at a budget, or a mask. ``budget`` of a mask is what it prunes, measured.

    ``generated``: what becomes of tokens after the prompt, in place of what the method or the mask says.
    """

    name: str
    what: Method | KVMask
    budget: Budget = field(default_factory=Budget)
    generated: Generated | None = None

    @property
    def queries(self) -> int:
        """How many of a prompt's last queries it looks at."""
        if isinstance(self.what, Method):
            return self.what.selection.observation_window
        return max((layer.queries for layer in self.what.plan), default=1)

    def options(self) -> dict[str, Any]:
        """What was asked for, for the record."""
        if isinstance(self.what, Method):
            return self.what.options()
        about = {name: getattr(self.what, name) for name in ("readout_scope", "prefill", "solver")}
        return {**asdict(self.what.windows), **about}

    @property
    def narrow(self) -> bool:
        """Whether the tokens of a prompt see each other as they are stored; a mask may say so."""
        return isinstance(self.what, KVMask) and self.what.prefill == "pruned"

    @property
    def keeps(self) -> Generated:
        """What becomes of generated tokens."""
        return self.generated or self.what.windows.generated

    def asked(self) -> dict[str, Any]:
        """The fields of a record that say what was asked for."""
        return {
            "method": self.name,
            "options": self.options(),
            "ratio": self.budget.ratio,
            "value_ratio": self.budget.value_ratio,
            "budget_bytes": self.budget.bytes_per_token,
            "budget_share": self.budget.share,
            "generated": self.keeps,
        }

    def digest(self) -> str:
        """sha256 (hex) of what it does; of a mask, with its codecs."""
        digest = hashlib.sha256(json_text(self.asked(), default=str).encode())
        for layer in self.what.plan if isinstance(self.what, KVMask) else ():
            digest.update(repr((layer.index, layer.windows, layer.readout, layer.tokens, layer.choice)).encode())
            for kind, codecs in layer.codecs.items():
                for codec in codecs:
                    digest.update(repr((kind, codec.signature())).encode())
                    for tensor in codec.tensors().values():
                        digest.update(bytes_of(tensor).numpy().tobytes())
        return digest.hexdigest()

    def plan(self, captured: Captured) -> CachePlan:
        """The plan for a prompt. Raises InputError for what the method or the mask cannot do with it.

        Where a longer prompt may do, that is a ShareError.
        """
        if isinstance(self.what, KVMask):
            self.what.check_model(captured.model.config, str(captured.model.config.name_or_path))
            return self.what.plan.changed(generated=self.generated)
        selection = self.what.selection
        seen = captured.observed(selection.observation_window, self.what.windows, selection.spans)
        try:
            return apply(self.what, seen, self._of_layers(captured)).changed(generated=self.generated)
        except ShareError as error:
            raise ShareError(f"{self.name}: {error}") from None

    def _of_layers(self, captured: Captured) -> Budget:
        """A share of the whole cache, as a share of the layers that can be compressed."""
        if self.budget.share is None:
            return self.budget
        full = cache_nbytes(captured.past)
        layers = [captured.past.layers[i] for i in captured.queries]
        others = full - sum(each.nbytes for layer in layers for each in (layer.keys, layer.values))
        left = self.budget.share * full - others
        if left <= 0:
            raise ShareError(
                f"the model's other layers hold {others / full:.3g} of the cache and cannot be compressed, and a share "
                f"of {self.budget.share:g} is asked for; raise the share"
            )
        return replace(self.budget, share=left / (full - others))

    def cache(self, captured: Captured, plan: CachePlan) -> PrunedCache:
        """The real cache of this plan after the prompt, to be released by its caller."""
        return narrow(captured, plan) if self.narrow else replay(captured, plan)


def trials(methods: Mapping[str, Method], budgets: Sequence[Budget], generated: Generated | None = None) -> list[Trial]:
    """Every method at every budget, by budget."""
    return [Trial(name, each, budget, generated) for budget in budgets for name, each in methods.items()]


def _pruned(mask: KVMask, kind: Kind) -> float:
    """Which fraction of the numbers of a model's keys or values a mask leaves out of rows."""
    codecs = [codec for layer in mask.plan for codec in layer.codecs.get(kind, ()) if codec.n]
    return sum(codec.heads - codec.width / codec.n for codec in codecs) / (mask.layer_count * mask.num_key_value_heads)


def mask_trial(name: str, mask: KVMask, generated: Generated | None = None) -> Trial:
    """A mask, with everything that it says."""
    pruned, pruned_values = (_pruned(mask, kind) for kind in KINDS)
    return Trial(name, mask, Budget(pruned, pruned_values), generated)
