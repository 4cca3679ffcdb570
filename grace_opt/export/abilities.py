"""What a runtime can do with a mask, declared once: `Target.supports` and `grace-opt solve --target` read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from grace_opt.heads import KINDS, Kind

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask
    from grace_opt.compression.method import Method


@dataclass(frozen=True)
class Abilities:
    """What a target runs; by default everything that our cache does.

    Attributes:
        models: types of models (as their configurations call them); empty: any.
        sliding_layers: models with layers of a sliding window too.
        kinds: what may be compressed.
        one_width: all heads of a kind must be of one width, in all layers.
        readouts: scopes of read-outs, those that `solve` takes first.
        integers: rows may be packed.
        token_policies: tokens may be dropped.
        choices: a method may choose from each prompt.
        joint: a row may be of all KV heads of a layer.
        whole_tokens: sinks and the recent window may stay whole.
        recent_window: the window that `solve` takes; None: that of the graphs.
        prefill: how prompts are computed: ``full``, or ``pruned`` (on what is stored).
        generated: what becomes of generated tokens; None: what the mask says.
    """

    models: tuple[str, ...] = ()
    sliding_layers: bool = True
    kinds: tuple[Kind, ...] = KINDS
    one_width: bool = False
    readouts: tuple[str, ...] = ("prefill", "static", "none")
    integers: bool = True
    token_policies: bool = True
    choices: bool = True
    joint: bool = True
    whole_tokens: bool = True
    recent_window: int | None = None
    prefill: Literal["full", "pruned"] = "full"
    generated: Literal["keep", "prune"] | None = None

    def method_options(self) -> dict[str, Any]:
        """Options of a method, by their names, that `solve` takes where the user says nothing."""
        window = self.recent_window if self.whole_tokens else 0
        options = {
            "generated": self.generated,
            "recent_window": window,
            "sinks": None if self.whole_tokens else 0,
            "budget": "uniform" if self.one_width else None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def as_run(self, mask: KVMask) -> KVMask:
        """The mask with what the runtime makes of prompts and of generated tokens."""
        return replace(mask, prefill=self.prefill, plan=mask.plan.changed(generated=self.generated))


@dataclass(frozen=True)
class Needs:
    """What a mask, or one that is to be solved for, asks of a runtime; fields as those of `Abilities`."""

    kinds: Collection[Kind]
    readout: str = "none"
    widths: int = 1  #: how many different ones the heads of a kind have, at most
    integers: bool = False
    token_policies: bool = False
    choices: bool = False
    joint: bool = False
    whole_tokens: bool = False
    prefill: str = "full"
    generated: str = "prune"
    all_layers: bool = True  #: each layer has what is compressed

    @classmethod
    def of_mask(cls, mask: KVMask) -> Needs:
        """Those of a mask."""
        plans = list(mask.plan)
        pressed = {
            kind: [list(plan.codecs.get(kind, ())) for plan in plans]
            for kind in KINDS
            if any(codec.width < codec.n or codec.block for plan in plans for codec in plan.codecs.get(kind, ()))
        }
        return cls(
            kinds=tuple(pressed),
            readout=mask.readout_scope,
            widths=max((len({c.width for codecs in each for c in codecs}) for each in pressed.values()), default=1),
            integers=any(codec.block for each in pressed.values() for codecs in each for codec in codecs),
            token_policies=any(plan.tokens is not None for plan in plans),
            choices=any(plan.choice is not None for plan in plans),
            joint=any(plan.joint for plan in plans),
            whole_tokens=any(plan.windows.recent_window or plan.windows.sinks for plan in plans),
            prefill=mask.prefill,
            generated="keep" if any(plan.windows.generated == "keep" for plan in plans) else "prune",
            all_layers=all(len(each) == mask.layer_count and all(each) for each in pressed.values()),
        )

    @classmethod
    def of_method(cls, method: Method, kinds: Collection[Kind], readout: str, *, whole_tokens: bool) -> Needs:
        """Those of the mask that `grace-opt solve` makes by a method."""
        return cls(
            kinds=tuple(kinds),
            readout=readout,
            widths=1 if method.sharing.budget == "uniform" else 2,
            integers=any(method.bits(kind) for kind in KINDS),
            whole_tokens=whole_tokens,
            generated=method.windows.generated,
        )


def refusals(can: Abilities, needs: Needs) -> Iterator[str]:
    """What stands in the way, the most general first; each the end of a sentence that begins with "the target NAME"."""
    nothing = not needs.kinds and not needs.choices and not needs.token_policies
    yield from (
        said
        for refused, said in (
            (
                needs.choices and not can.choices,
                "cannot choose channels from each prompt; make a mask with grace-opt solve",
            ),
            (
                needs.token_policies and not can.token_policies,
                "cannot drop tokens (token policy); solve with a method that has none, as grace-opt",
            ),
            (nothing, "needs a mask that compresses keys or values; solve with a ratio above 0"),
            (
                needs.integers and not can.integers,
                "cannot hold rows as integers; solve without key_bits and value_bits",
            ),
            (
                needs.joint and not can.joint,
                "reads rows of one KV head, and this mask's are of all heads of a layer; use the target hf-generate",
            ),
        )
        if refused
    )
    for kind in needs.kinds:
        if kind not in can.kinds:
            others = " and ".join(f"{each}s" for each in can.kinds)
            yield f"cannot prune {kind}s, only {others}; solve with --ratio 0 and --value-ratio, or with --budget-share"
    if needs.widths > 1 and can.one_width:
        yield "has one width for all heads, and this mask has several; solve with --budget uniform"
    if not needs.all_layers and can.one_width:
        yield "has one width for all layers, and this mask leaves some whole; solve a bundle of all layers"
    if needs.readout not in can.readouts:
        what = "fit read-outs to each prompt" if needs.readout == "prefill" else f"run {needs.readout} read-outs"
        yield f"cannot {what}; solve with --readout {' or '.join(can.readouts)}"
    if needs.whole_tokens and not can.whole_tokens:
        yield "keeps no token whole, and this mask has a window or sinks; solve with --recent-window 0 --sinks 0"
    if needs.prefill == "pruned" and can.prefill == "full":
        yield "runs prompts whole, and this mask asks for pruned prefill; solve for full prefill"
    if needs.generated == "keep" and can.generated == "prune":
        yield "cannot keep generated tokens whole; solve with --method-option generated=prune"


def model_refusals(can: Abilities, config: Any) -> Iterator[str]:
    """The same of a model, by its text configuration."""
    if can.models and config.model_type not in can.models:
        yield f"runs models of {', '.join(can.models)}, and this is a {config.model_type}; use the target hf-generate"
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if slides and not can.sliding_layers:
        yield "cannot run sliding-window layers, which this model has; use the target hf-generate"


#: what stored caches are made by: `grace_opt.export.store` and its target
STORED = Abilities(token_policies=False, choices=False, joint=False, generated="keep")
