"""How a model turns its keys with their positions (RoPE), measured with its own code: to turn them back, and again."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grace_opt.errors import InputError
from grace_opt.models.attention import attending_with, observing
from grace_opt.models.config import text_config
from grace_opt.models.inputs import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBED = 12  # positions of the text that tells whether a layer's keys turn as its tables say
_CHANGING = {"dynamic", "longrope"}  # scalings by the length of the text
_SHORTEST = 1024  # positions of the first table


class Rotary:
    """The rotary embedding of a model; `rotary_of` makes one, and no work is done before it is asked.

    A table of an embedding holds, for each position, what each channel takes of itself and of its partner. It is what
    the model's own functions make of unit vectors, so half-split, interleaved and partial layouts, scaled frequencies
    (YaRN, Llama 3) and factors on cosines and sines come out as the model has them.

    Which layers turn, and by which table, is seen on a text of one token repeated: there every layer's keys before RoPE
    are the same at all positions. So a layer without RoPE is told from one with it, and a model that does anything
    else with positions is refused.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._layers: dict[int, Table | None] | None = None

    def __deepcopy__(self, memo: object) -> Rotary:
        return self

    def layers(self) -> dict[int, Table | None]:
        """Layer -> how its keys turn; None: not at all. One short pass of the model, at the first call.

        Raises InputError for a model whose keys turn in another way, or not by position alone.
        """
        with self._lock:
            if self._layers is None:
                model = self._model()
                assert model is not None
                self._layers = _found(model)
            return self._layers


_known: weakref.WeakKeyDictionary[Any, Rotary] = weakref.WeakKeyDictionary()


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The model's, one for all who ask."""
    return _known.setdefault(model, Rotary(model))


class Table:
    """What an embedding does to keys x [.., H, m, n] at positions int64[.., m]; in float32 at least."""

    def __init__(self, embed: Callable[[Tensor], tuple[Tensor, Tensor]], turn: Callable[..., Any], n: int) -> None:
        self._embed, self._turn, self._n = embed, turn, n
        cos, _ = embed(torch.arange(1))
        self._width, self.partner = _partners(turn, cos.shape[-1], n)
        self._rolled = bool((self.partner == torch.arange(n).roll(n // 2)).all())
        self._both: tuple[Tensor, Tensor] | None = None  # what turns, and what turns back: [positions, 2, n]

    def __deepcopy__(self, memo: object) -> Table:
        return self

    def reach(self, length: int) -> None:
        """Cover the positions below ``length``, before they are asked for."""
        if self._both is None or len(self._both[0]) < length:
            self._both = self._made(max(_SHORTEST, 1 << (length - 1).bit_length()))

    def forth(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys as attention meets them, of keys before RoPE."""
        return self._applied(x, positions, False)

    def back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys before RoPE, of keys as attention meets them."""
        return self._applied(x, positions, True)

    def _made(self, length: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = self._embed(torch.arange(length))
            own = torch.arange(self._width)
            lower, upper = ((own < self.partner[own]).float(), (own > self.partner[own]).float())
            at = [each.to(cos.device).expand(1, 1, length, -1) for each in (lower, upper)]
            of_lower, of_upper = (each[0, 0].float().cpu() for each in self._turn(*at, cos, sin)[:2])
            forth = torch.stack([torch.ones(length, self._n), torch.zeros(length, self._n)], dim=1)
            forth[:, 0, own] = of_lower * lower + of_upper * upper + (1 - lower - upper)
            forth[:, 1, own] = of_upper * lower + of_lower * upper
            (a, b), (d, c) = forth.unbind(1), forth[..., self.partner].unbind(1)
            # The inverse of [[a, b], [c, d]], whatever a factor or the rounding of cosines made of its determinant.
            back = torch.stack([d, -b], dim=1) / (a * d - b * c)[:, None]
            return forth.to(cos.device), back.to(cos.device)

    def _applied(self, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        assert self._both is not None
        table = self._both[back].to(x.device)
        own, other = table[positions].unsqueeze(-4).unbind(-2)  # [.., 1, m, n]
        across = x.roll(self._n // 2, -1) if self._rolled else x[..., self.partner.to(x.device)]
        return (x * own + across * other).to(x.dtype)


@dataclass(frozen=True)
class Turn:
    """How RoPE turns the keys of one layer."""

    rotary: Rotary
    layer: int

    @property
    def table(self) -> Table | None:
        """None: it does not."""
        return self.rotary.layers().get(self.layer)

    def reach(self, length: int) -> None:
        """Make the table cover the positions below ``length``."""
        if self.table is not None:
            self.table.reach(length)

    def back(self, keys: Tensor) -> Tensor:
        """Keys [H, T, n] of a prompt, from its first token on, as they were before RoPE."""
        if self.table is None:
            return keys
        self.reach(keys.shape[1])
        return self.table.back(keys, torch.arange(keys.shape[1], device=keys.device))


def _found(model: PreTrainedModel) -> dict[int, Table | None]:
    keys, attention = _probe(model)
    positions, embeddings = torch.arange(_PROBED), _embeddings(model)
    tables: dict[int, list[Table]] = {}  # by the channels of a key
    found: dict[int, Table | None] = {}
    for layer, key in keys.items():
        n = key.shape[-1]
        if n not in tables:
            tables[n] = list(_tables(model, attention, n))
        for table in tables[n]:
            table.reach(_PROBED)
        ways: list[Table | None] = [*tables[n], None]
        held = [key if way is None else way.back(key, positions.to(key.device)) for way in ways]
        spread = [float((each - each[:, :1]).abs().max()) for each in held]
        best = min(range(len(ways)), key=spread.__getitem__)
        if embeddings and not spread[best] <= _slack(model) * float(key.abs().max()):
            raise InputError(_refusal(model, layer, embeddings))
        found[layer] = ways[best]  # without an embedding keys are never turned, whatever the positions do to them
    return found


def _refusal(model: PreTrainedModel, layer: int, embeddings: Sequence[torch.nn.Module]) -> str:
    why = "what its keys are before their positions turn them cannot be told"
    types = {str(name) for each in embeddings for name in _types(each)} & _CHANGING
    if types:
        why = f"its RoPE ({', '.join(sorted(types))}) changes with the length of the text"
    return f"layer {layer} of {type(model).__name__}: {why}; use a codec of keys after RoPE, such as svd or grace-opt's"


def _slack(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype == torch.float32 else 0.05


def _probe(model: PreTrainedModel) -> tuple[dict[int, Tensor], Any]:
    """Layer -> the keys [H, _PROBED, n] of one token repeated, float32; and one of the attention modules."""
    keys: dict[int, Tensor] = {}
    modules: list[Any] = []

    def see(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, arguments: dict[str, Any]) -> None:
        modules.append(module)
        if arguments.get("sliding_window") is None:  # those caches are short already
            keys[module.layer_idx] = key[0].float()

    ids = torch.full((1, _PROBED), text_config(model.config).vocab_size // 3, device=input_device(model))
    with torch.no_grad(), attending_with(model, observing(see)):
        model.base_model(input_ids=ids, use_cache=False)
    if not modules:
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface; use a model that does"
        )
    return keys, modules[0]


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that give cosines and sines."""
    return [
        each
        for each in model.base_model.modules()
        if any(name.endswith("inv_freq") for name, _ in each.named_buffers(recurse=False))
    ]


def _types(embedding: torch.nn.Module) -> list[Any]:
    kind = getattr(embedding, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind]


def _tables(model: PreTrainedModel, attention: Any, n: int) -> Iterator[Table]:
    """Of each rotary embedding of the usual form that depends on positions alone."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    embeddings = _embeddings(model)
    if not embeddings:
        return
    if turn is None:
        raise InputError(
            f"{type(model).__name__} has no rotary embedding of the usual form, so its keys cannot be turned back"
        )
    for embedding in embeddings:
        if _CHANGING & set(_types(embedding)):
            continue
        by_type = "layer_type" in inspect.signature(embedding.forward).parameters
        kind = {"layer_type": "full_attention"} if by_type else {}  # the others' caches are short already
        buffer = next(embedding.buffers())
        like = torch.zeros(1, 1, n, device=buffer.device, dtype=model.dtype)

        def embed(
            positions: Tensor, embedding: Any = embedding, like: Tensor = like, kind: dict[str, str] = kind
        ) -> tuple[Tensor, Tensor]:
            cos, sin = embedding(like, positions[None].to(like.device), **kind)
            return cos, sin

        try:
            yield Table(embed, turn, n)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            continue  # of a tower for pictures or sounds, say


def _partners(turn: Callable[..., Any], width: int, n: int) -> tuple[int, Tensor]:
    """How many of the first channels of n the model's function takes, and with which each turns, int64[n]."""
    for size in (n, width):
        units = torch.eye(size)[None, None]  # a token for each channel
        cos, sin = torch.full((1, size, width), 0.6), torch.full((1, size, width), 0.8)
        try:
            turned = turn(units, units, cos, sin)[0][0, 0]
        except RuntimeError:
            continue  # some slice what turns before they call it
        partner = torch.arange(n)
        for channel, reached in enumerate(turned.abs() > 0.1):
            met = reached.nonzero()[:, 0].tolist()
            if channel not in met or len(met) > 2:
                raise ValueError("channels do not turn in pairs")
            partner[channel] = next((each for each in met if each != channel), channel)
        return size, partner
    raise ValueError("its widths do not fit")
