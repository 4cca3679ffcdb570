"""What transformers only warns of when it loads a model, and what it does not look at."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.models.inputs import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Left over, and nothing is lost: buffers that are computed, and scales that other runtimes hold caches and activations
# by. Those of weights count: without them the weights are other numbers.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$"
    r"|(^|[._])(k|v|q|kv|prob|input|output|activation)_(scale|zero_point)$"
)
_SCALES = re.compile(r"(^|[._])(scales?|scale_inv|zero_point|zeros|qzeros|g_idx|absmax|quant_map)$")


def require_whole(name: str, report: Mapping[str, Any], quantised: bool) -> None:
    """Raise InputError if weights were missing (they would be random), left over or of another shape, naming some.

    ``report``: what ``from_pretrained(output_loading_info=True)`` says. Tied weights, and those that a model's class
    says it can do without, are not in it. ``quantised``: whether a quantiser read the scales that it knows.
    """
    other = report.get("mismatched_keys") or ()
    if other:
        shapes = [f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in other]
        raise InputError(f"{name} has weights of other shapes than its configuration says: {_some(shapes)}; {_CURE}")
    left = [key for key in report.get("unexpected_keys") or () if not _is_harmless(key, quantised)]
    missing = report.get("missing_keys") or ()
    if missing:
        also = f", and holds {_some(left)} that it does not know" if left else ""
        raise InputError(f"{name} lacks weights of the model: {_some(missing)}{also}; {_CURE}")
    if left:
        raise InputError(f"{name} holds weights that the model does not know: {_some(left)}; {_CURE}")
    if report.get("error_msgs"):
        raise InputError(f"{name} could not be loaded whole: {_some(map(str, report['error_msgs']))}; {_CURE}")


_CURE = "save the model again with save_pretrained, or mend its config.json"


def _is_harmless(key: str, quantised: bool) -> bool:
    return bool(_HARMLESS.search(key)) or (quantised and bool(_SCALES.search(key)))


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def require_fit(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError if ordinary words, or the token before every text, have no row in the model's embedding.

    Added tokens may lie beyond (Gemma 3's of 1B parameters does, for images): `require_rows` refuses them in a text.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    added: Collection[int] = set(tokenizer.get_added_vocab().values()) - {tokenizer.bos_token_id}
    most = max(set(tokenizer.get_vocab().values()) - set(added), default=0)
    if most >= rows:
        raise InputError(
            f"the tokenizer of {name} gives tokens up to {most} and the model knows {rows}; put the model's own "
            "tokenizer into the folder"
        )
