"""What a compressed cache holds, and from how many tokens on that is less than a full one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grace_opt.heads import KINDS, Kind
from grace_opt.problem import prune_count

if TYPE_CHECKING:
    from grace_opt.compression.codec import Codec
    from grace_opt.compression.plan import LayerPlan

Shapes = Mapping[Kind, tuple[int, int]]  # kind -> KV heads, and channels of a whole token

_LONGEST = 2**31


def row_unit(itemsize: int) -> int:
    """Of how many elements the room of a row that is held as it came is a multiple.

    In 16 bits rows begin at multiples of 16 bytes, as cards load them.
    """
    return 8 if itemsize == 2 else 1


def room_of(width: int, itemsize: int) -> int:
    """Elements that a row of this width takes."""
    return -(-width // row_unit(itemsize)) * row_unit(itemsize)


def pays_from(layers: Mapping[int, LayerPlan], shapes: Mapping[int, Shapes], itemsize: int) -> int | None:
    """The length of the shortest prompt from which on these layers take fewer bytes than full ones.

    ``shapes``: of each layer; ``itemsize``: bytes of an element of keys and values. For one row; growth space is left
    out. None if it never pays, or if a codec is only fitted to a prompt, so that its size is not known. O(log of the
    answer).
    """
    codecs = {i: _codecs(plan, shapes[i]) for i, plan in layers.items()}
    if any(each is None for each in codecs.values()):
        return None

    def saved(tokens: int) -> float:
        full = sum(heads * n for of_layer in shapes.values() for heads, n in of_layer.values())
        held = sum(_of_codecs(plan, codecs[i] or {}, tokens, itemsize) for i, plan in layers.items())
        return tokens * full * itemsize - held

    # Up to here every token is whole; from here on each token more saves something, if it ever does.
    low = max(
        (each.windows.sinks + each.windows.recent_window + each.windows.spare for each in layers.values()), default=0
    )
    high = low + 1
    while saved(high) <= 0:
        low, high = high, 2 * high
        if high > _LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saved(middle) > 0 else (middle, high)
    return high


def held_bytes(plan: LayerPlan, shapes: Shapes, tokens: int, itemsize: int, kept: Sequence[int] | None = None) -> float:
    """Bytes of one row of a layer after a prompt of so many tokens (docs/cache.md), by a plan that names its codecs.

    Windows, scales, positions and read-outs are counted; growth space is not. ``kept``: how many old tokens a policy
    ``per_head`` keeps in each head; None: equally many.
    """
    return _of_codecs(plan, _codecs(plan, shapes) or {}, tokens, itemsize, kept)


def _codecs(plan: LayerPlan, shapes: Shapes) -> dict[Kind, list[Codec]] | None:
    """Of each head, if all are known before the prompt."""
    found = {kind: _of_kind(plan, kind, *shapes[kind]) for kind in KINDS}
    known = {kind: each for kind, each in found.items() if each is not None}
    return known if len(known) == len(found) else None


def _of_kind(plan: LayerPlan, kind: Kind, heads: int, n: int) -> list[Codec] | None:
    from grace_opt.compression.channels import Channels
    from grace_opt.compression.codec import Whole
    from grace_opt.compression.integers import as_integers
    from grace_opt.compression.plugins import CODECS

    if plan.choice is None or not plan.choice.compresses(kind):
        return [each.sized(n) for each in plan.codecs.get(kind, [Whole()] * heads)]
    method, sharing = plan.choice.method, plan.choice.method.sharing
    prune = prune_count(plan.choice.budget.of(kind), n, up=sharing.rounding == "ceil", align=sharing.align)
    if method.codec != "whole" and not CODECS[method.codec].selects:
        return None
    inner = Whole(n) if method.codec == "whole" else Channels.keeping(range(n - prune), n)
    return [as_integers(inner, method.bits(kind) or 0, kind)] * heads


def _chosen(plan: LayerPlan, tokens: int) -> int:
    """How many of the old ones a policy keeps."""
    return round(plan.tokens.share * _old(plan, tokens)) if plan.tokens is not None else 0


def _old(plan: LayerPlan, tokens: int) -> int:
    return max(0, tokens - plan.windows.sinks - plan.windows.recent_window)


def _of_codecs(
    plan: LayerPlan,
    codecs: Mapping[Kind, Sequence[Codec]],
    tokens: int,
    itemsize: int,
    kept: Sequence[int] | None = None,
) -> float:
    count = max(map(len, codecs.values()), default=1)
    whole = tokens - _old(plan, tokens) if plan.tokens is not None else tokens
    stay = [whole + each for each in kept or [_chosen(plan, tokens)] * count]
    of_heads = sum(
        _held(plan, codec, of_head, itemsize)
        for each in codecs.values()
        for codec, of_head in zip(each, stay, strict=False)  # one codec may be of all heads
    )
    apart = plan.tokens is not None and plan.tokens.policy.per_head
    alike = [{codec.signature() for codec in each} for each in codecs.values()]
    if apart:
        parts = count
    elif max(map(len, alike), default=1) == 1:
        parts = 1 if codecs else 0
    else:
        parts = len({tuple(codec.signature() for codec in head) for head in zip(*codecs.values(), strict=True)})
    return of_heads + 8 * parts + sum(_positions(plan, each, each - whole) for each in (stay if apart else stay[:1]))


def _positions(plan: LayerPlan, stay: int, chosen: int) -> int:
    """Bytes that say which tokens a policy keeps, and which of them hold residuals."""
    if plan.tokens is None:
        return 0
    return 8 * stay + (8 * chosen if plan.tokens.policy.whole and plan.codecs else 0)


def _held(plan: LayerPlan, codec: Codec, stay: int, itemsize: int) -> float:
    """Bytes of one codec's keys or values, ``stay`` tokens after a prompt (docs/cache.md)."""
    windows, width, dropped = plan.windows, codec.width, codec.residual_width * codec.heads
    last = windows.recent_window + windows.spare
    blocks = max(0, stay - windows.sinks - last) // codec.block * codec.block if codec.block else 0
    room = width if codec.block else room_of(width, itemsize)
    total = codec.nbytes(blocks, itemsize) + (stay - blocks) * room * itemsize
    whole = min(stay, last) + min(stay, windows.sinks)
    total += (stay if plan.tokens is not None and plan.tokens.policy.whole else whole) * dropped * itemsize
    for each in codec.tensors().values():
        total += each.numel() * (itemsize if each.is_floating_point() else each.element_size())
    return total + itemsize * _fitted(plan, codec)


def _fitted(plan: LayerPlan, codec: Codec) -> int:
    """Numbers of the read-out that the cache fits to a prompt for one head."""
    from grace_opt.compression.channels import Channels

    inner = getattr(codec, "inner", codec)
    if plan.readout is None or not isinstance(inner, Channels) or inner.constant is not None:
        return 0
    columns = {"none": 0, "mean": 1}.get(plan.readout.readout_fit, 1 + inner.width)
    return inner.residual_width * columns
