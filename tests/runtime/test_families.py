"""Every decoder family of the installed transformers over the channel-pruned cache: it works, or it says why not.

``python tests/runtime/test_families.py > docs/families.md`` records the outcomes for the installed transformers.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import grace_opt.runtime
from grace_opt import InputError, KVMask
from tests.support import ROOT
from tests.support.families import tiny_model
from tests.support.generation import steps
from tests.support.reference import use_zero_channel_attention
from tests.support.slack import logit_slack

PAGE = ROOT / "docs" / "families.md"
# A multimodal model's language model has a class of its own.
NAMES = sorted({name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if "ForConditional" not in name})
NEW, RECENT, SINKS, KEPT = 16, 3, 2, 7

INTRODUCTION = """\
# Model families

<!-- Written by tests/runtime/test_families.py: python tests/runtime/test_families.py > docs/families.md -->

Which decoder classes of transformers run with the [channel-pruned cache](cache.md), by the test that wrote this page: a
tiny random model of every class that `AutoModelForCausalLM` knows, two padded rows and one without padding, 16 greedy
tokens.

- **Works**: the tokens equal, and the logits within 1e-4 of the largest, those of the model's own attention over a full
  cache that shows it zeros in the pruned channels, and those of `tests/support/reference.py`; the pruning changes them;
  and a mask that prunes nothing changes nothing. Ordinary attention layers are pruned; those named are left whole.
- **Refused**: a sentence (`grace_opt.InputError`) comes before any number.
- **Stopped**: another error comes before any number.
- **Not run**: the model does not generate here without grace-opt either.

GQA, MQA and MHA are what was tested: a family with fewer KV heads than query heads here may be released with as many.

"""
VERSION = f"transformers {transformers.__version__}, "
SECTIONS = {
    "Works": "attention",
    "Wrong": "what differs",
    "Refused": "sentence",
    "Stopped": "error",
    "Not run": "reason",
}
# Of these, there is nothing to learn from a tiny model alone.
NOT_RUN = {
    "BltForCausalLM": "cuts its input into patches by a second model, and transformers cannot make a cache for it",
    "MusicgenForCausalLM": "generates audio codes in a way of its own",
    "MusicgenMelodyForCausalLM": "generates audio codes in a way of its own",
    "xLSTMForCausalLM": "has no attention, and transformers' cache for it does not fit a tiny model",
    "Gemma4AssistantForCausalLM": "drafts for another model and reads that model's cache",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model and reads that model's cache",
}


class ZeroedLayer(DynamicLayer):
    """A full cache that shows the model's own attention zeros in the pruned channels of old tokens."""

    def __init__(self, keep: torch.Tensor, first: torch.Tensor) -> None:
        super().__init__()
        self.keep, self.first = keep, first  #: bool[H, D]; int64[B], each row's first real token

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[2] > 1:  # the prompt
            return keys, values
        slot = torch.arange(keys.shape[2])
        sink = (slot >= self.first[:, None]) & (slot < self.first[:, None] + SINKS)
        whole = sink | (slot >= keys.shape[2] - RECENT)
        return torch.where(whole[:, None, :, None] | self.keep[:, None], keys, 0.0), values


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 13 tokens, two of them padded on the left."""
    ids = torch.randint(3, 99, (3, 13), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, :5] = 0
    attended[2, :2] = 0
    return ids, attended


def run(model: Any, past: Any = None) -> Any:
    """NEW greedy tokens."""
    ids, attended = prompts()
    with contextlib.redirect_stdout(sys.stderr):  # some models print
        return model.generate(
            ids,
            attention_mask=attended,
            past_key_values=past,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )


def differs(one: Any, other: Any) -> bool:
    """Whether the tokens differ, or the logits by more than 1e-4 of the largest."""
    tolerance = logit_slack(other.logits)
    try:
        return not all(bool(((a - b).abs() <= tolerance).all()) for a, b in steps(one, other, tolerance))
    except AssertionError:
        return True


def shapes_of_keys(past: Any) -> dict[int, tuple[int, int]]:
    """Layer -> (KV heads, channels) of the ordinary attention layers that were used; of others if there are none."""
    layers = dict(enumerate(getattr(past, "layers", [])))
    held = {i: layer.keys.shape for i, layer in layers.items() if getattr(layer, "keys", None) is not None}
    held = {i: (shape[1], shape[3]) for i, shape in held.items() if len(shape) == 4}
    ordinary = {i: shape for i, shape in held.items() if type(layers[i]) is DynamicLayer}
    return ordinary or held or {0: (2, 16)}


def mask_of(model: Any, shapes: dict[int, tuple[int, int]], kept: int | None) -> KVMask:
    """A mask of ``kept`` random channels (all if None) in the layers that have the first one's shape."""
    rng = np.random.default_rng(0)
    heads, dim = next(iter(shapes.values()))
    keep = {
        layer: tuple(np.sort(rng.choice(dim, kept or dim, replace=False)).astype(np.int32) for _ in range(heads))
        for layer, shape in shapes.items()
        if shape == (heads, dim)
    }
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return KVMask.of_channels("tiny", heads, dim, keep, num_hidden_layers=layers, recent_window=RECENT, sinks=SINKS)


def kind(model: Any, mask: KVMask) -> str:
    """What a model's attention is like, as its configuration and its modules' names tell."""
    config = model.config.get_text_config(decoder=True)
    heads = {config.num_attention_heads: "MHA", 1: "MQA"}.get(mask.num_key_value_heads, "GQA")
    norm = any(re.search(r"\b(q|k|qk|query|key)_?(layer_?)?norm", name) for name, _ in model.named_modules())
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}  # some have one for each kind of layer, and none for some
    partial = rope.get("partial_rotary_factor", 1) < 1
    words = [heads, "partial RoPE" if partial else "RoPE" if rope else "no RoPE", *["QK norm"] * norm]
    types = getattr(config, "layer_types", None) or []
    left = sorted({each for layer, each in enumerate(types) if layer not in mask.key_keep} - {"moe", "mlp"})
    return ", ".join(words) + (f"; whole: {', '.join(left)}" if left else "")


def sentence(family: str, problem: Exception) -> str:
    """An error in one line, the same for all families that it stops in the same way."""
    text = " ".join(str(problem).split()).replace(family, "the model")
    text = text.translate(
        {ord("|"): "/", ord("<"): None, ord(">"): None}
    )  # what a Markdown table would take for its own
    return text if isinstance(problem, InputError) else f"{type(problem).__name__}: {text[:160]}"


def outcome(family: str) -> tuple[str, str]:
    """(section, description) of what happens with a tiny model of the family."""
    if family in NOT_RUN:
        return "Not run", NOT_RUN[family]
    try:
        model = tiny_model(family)
    except Exception as problem:
        return "Not run", sentence(family, problem)
    model.set_attn_implementation("eager")  # the model's own code, which knows all that it wants of attention
    try:
        plain, why_not = run(model), ""
    except Exception as problem:
        plain, why_not = None, sentence(family, problem)
    shapes = shapes_of_keys(plain and plain.past_key_values)
    try:
        mask, everything = mask_of(model, shapes, KEPT), mask_of(model, shapes, None)
        past = grace_opt.runtime.cache(mask, model)
        pruned = run(model, past)
    except InputError as problem:
        return "Refused", sentence(family, problem)
    except Exception as problem:
        return ("Stopped", sentence(family, problem)) if plain else ("Not run", why_not)
    assert plain, why_not
    same = run(model, grace_opt.runtime.cache(everything, model))
    layers: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    ids, attended = prompts()
    for layer in mask.key_keep:
        layers[layer] = ZeroedLayer(torch.from_numpy(mask.keep_matrix()[layer]), (1 - attended).sum(1))
    model.set_attn_implementation("eager")
    own = run(model, Cache(layers=layers))
    use_zero_channel_attention(model, mask)
    reference = run(model)
    wrong = {
        "the cache was not used": {past.get_seq_length(layer) for layer in mask.key_keep} != {ids.shape[1] + NEW - 1},
        "pruning changes nothing": not differs(pruned, plain),
        "a mask that prunes nothing changes something": differs(same, plain),
        "it is not the model's own attention over zeros": differs(pruned, own),
        "it is not the reference": differs(pruned, reference),
    }
    if any(wrong.values()):
        return "Wrong", "; ".join(what for what, is_so in wrong.items() if is_so)
    return "Works", kind(model, mask)


def render() -> str:
    """The page for the installed transformers."""
    found: dict[str, dict[str, list[str]]] = {section: {} for section in SECTIONS}
    for name in NAMES:
        section, description = outcome(name)
        found[section].setdefault(description, []).append(name)
    counts = {section: sum(map(len, groups.values())) for section, groups in found.items()}
    total = ", ".join(f"{section.lower()} {count}" for section, count in counts.items())
    page = f"{INTRODUCTION}{VERSION}{len(NAMES)} classes: {total}.\n"
    for section, groups in found.items():
        if groups:
            page += f"\n## {section}\n\n| {SECTIONS[section]} | classes |\n|---|---|\n"
        for description, names in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
            page += f"| {description} | {', '.join(f'`{name}`' for name in names)} |\n"
    return page


def recorded() -> dict[str, tuple[str, str]]:
    """Class -> (section, description) by the page; empty without it, or with another transformers than the page's."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    found, section = {}, ""
    for line in page.splitlines() if VERSION in page else []:
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if row := re.fullmatch(r"\| (.+) \| (`.+`) \|", line):
            found |= dict.fromkeys(re.findall(r"`(\w+)`", row[2]), (section, row[1]))
    return found


RECORDED = recorded()


@pytest.mark.parametrize("family", NAMES)
def test_a_family_does_what_the_page_says_and_nothing_wrong(family: str) -> None:
    section, description = outcome(family)
    assert section != "Wrong", description
    if RECORDED:
        expected = RECORDED.get(family)
        assert (section, description) == expected, "run: python tests/runtime/test_families.py > docs/families.md"


if __name__ == "__main__":
    print(render(), end="")
