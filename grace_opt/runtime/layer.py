"""One layer of the compressed cache. Over 400 lines, because half of it answers what transformers asks of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from grace_opt.compression.apply import for_prompt
from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import without_integers
from grace_opt.compression.method import CROP
from grace_opt.compression.pays import Shapes, room_of
from grace_opt.compression.plan import LayerPlan
from grace_opt.compression.tiles import arranged
from grace_opt.errors import InputError
from grace_opt.graphs.observed import OutputProjection
from grace_opt.heads import KINDS, Kind
from grace_opt.models.given import Given
from grace_opt.models.rotary import Table, Turn
from grace_opt.runtime.buffers import Buffer, Growing, followed, taken
from grace_opt.runtime.handle import Handle
from grace_opt.runtime.kernels.choose import usable
from grace_opt.runtime.kernels.contract import Kernel
from grace_opt.runtime.packed import Packed
from grace_opt.runtime.prompt import Rows, Staying, narrowed, observed, staying
from grace_opt.runtime.side import Coding, Side
from grace_opt.runtime.slots import Slots, first_seen, refuse_right_padding
from grace_opt.runtime.windows import Kept, Ring, Window


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Rows of all tokens that stay; residuals of the sinks, of the recent window, and of what a policy keeps whole.

    "Base plus residual window": the residual of a token that leaves the window is overwritten; nothing is packed again.
    The codecs of all KV heads have one signature (`RaggedLayer` for others).

    Residuals of ``spare`` more tokens than the window, but no more than the window has, are held so that as many tokens
    can be taken back (`crop`): those that move into the window from behind are whole again.

    A token has a *slot* in the buffers. Without a token policy that is its position; where tokens were dropped,
    ``slots`` says which it is.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    is_static = False

    dtype: torch.dtype
    device: torch.device
    first: Tensor  #: int64[B], the slot of each row's first real token
    shapes: Shapes
    key_side: Side
    value_side: Side

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.index = plan, plan.index
        self.sinks, self.recent_window = plan.windows.sinks, plan.windows.recent_window
        self.keeps = plan.windows.generated == "keep"
        self.spare = plan.windows.spare
        self.offloading = False
        self.kernel: str | None = None  #: the only kernel to decode with, if one was asked for
        self.turn: Turn | None = None  #: how RoPE turns the layer's keys, for codecs that ask
        self.given: Given | None = None  #: what the attention was given, if a codec asks
        self.stepwise = False  #: whether tokens of one update see each other as if they came one by one
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        for name in ("key_side", "value_side"):
            vars(self).pop(name, None)
        self.length: int = 0  #: slots in use
        self.prompt_length = 0  #: slots of the prompt
        self.slots: Slots | None = None  #: where tokens lie, if some were dropped
        self.sink_count = 0  #: for how many sinks of a row there is room, no more than have come
        self.sinks_start: int | None = None  #: slot of the first sink, if it is the same in all rows
        self.sinks_end = 0  #: one past the last sink of any row
        self.firsts: list[int] = []  # what ``first`` holds
        self._sought = 0  # up to which length rows may lack their first real token, or sinks
        self.kernels: list[Kernel] = []  #: those that read it, the best first; known once the prompt is stored
        self._whole = False  # whether all tokens are held as they come, since none is old yet
        self._prompt: tuple[Tensor, Tensor] | None = None  # of the first update, until `begin`
        self._unattended = False  # whether tokens came that `attention` has not seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and shapes from the first states. Raises InputError if the plan does not fit them."""
        if not key_states.shape[0] or not key_states.shape[2]:
            raise InputError("a cache was given no tokens; give at least one row and one token")
        self.plan.check(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch = key_states.shape[0]
        self.shapes = shapes_of(key_states, value_states)
        self.first = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.is_initialized = True

    @property
    def dropped(self) -> int:
        """Tokens that have come and have no slot."""
        return 0 if self.slots is None else self.slots.dropped

    @property
    def extra(self) -> Tensor | None:
        """int64[B, K], slots of whole tokens beside sinks and window, -1 for none; None if there are none."""
        return None if self.slots is None else self.slots.extra

    @property
    def columns(self) -> int:
        """For how many slots scores are computed."""
        return self.length

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values."""
        return self.key_side, self.value_side

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store new tokens [B, Hkv, n, D]; returns a handle that only `attention` can read, for keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        if self.offloading:
            self.prefetch()
        new = key_states.shape[2]
        self._grow(new)
        self._unattended = True
        if self._is_prompt(new):
            self._prompt = key_states, value_states
            handle = Handle(self, new, self._prompt)
            whole = self.plan.choice is None and "value" not in self.plan.kinds and self.plan.tokens is None
            return self._given(handle, value_states if whole else None)
        states = (key_states, value_states)
        if self._whole and not self.keeps and self._has_old():
            self._whole = False
            held = [next(side.buffer.parts()) for side in self.sides]
            self._store((held[0], held[1]), [])
        for side in self.sides:
            side.buffer.reserve(self.length)
            if side.turn is not None:
                side.turn.reach(self.columns)
        handle = Handle(self, new, None, states)
        if self.key_side.turn is not None:
            pass  # it waits for where rows begin, which positions are counted from
        elif new > 1 or not self.recent_window or (self.slots is not None and self.slots.reach is not None):
            handle.store()  # a kernel stores a single token, which stays recent, and moves none
        self._slide(new)
        exact = self.value_side.exact and self.slots is None
        if exact:
            handle.store(1)
        return self._given(handle, next(self.value_side.buffer.parts()) if exact else None)

    def _given(self, handle: Handle, values: Tensor | None) -> tuple[Handle, Any]:
        """What the model gets in place of keys and values: whole values as they are, since some models change them."""
        handle.values = values
        return handle, handle if values is None else values

    def _check(self, states: Tensor) -> None:
        if states.dtype != self.dtype or states.device != self.device:
            raise InputError(
                f"layer {self.index}'s cache holds {self.dtype} on {self.device} and was given {states.dtype} on "
                f"{states.device}; start a new cache"
            )
        if states.shape[0] != self.batch:
            raise InputError(
                f"layer {self.index}'s cache holds {self.batch} rows and was given {states.shape[0]}; start a new cache"
            )
        if self._unattended:
            raise InputError(
                f"layer {self.index}'s cache was given tokens whose attention was never computed (there was an error, "
                "or this model handles its cache itself); start a new cache"
            )

    def positions(self, slots: Tensor) -> Tensor:
        """int64[B, m] of slots int64[m] or [B, m]: what RoPE turns keys by, from each row's first real token on."""
        return (slots - self.first[:, None]).clamp(min=0)

    def _grow(self, new: int) -> None:
        self.length += new
        if self.slots is not None:
            self.slots.grow(new, self.length + self.dropped)

    def _is_prompt(self, new: int) -> bool:
        return self.length == new

    # ------------------------------------------------------------ the prompt

    @property
    def prompt(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the first update, until `begin`."""
        assert self._prompt is not None
        return self._prompt

    @property
    def waits(self) -> bool:
        """Whether the first update has come and was not stored yet."""
        return self._prompt is not None

    def first_of(self, mask: Tensor | None) -> Tensor:
        """int64[B], where each row of the first update begins. Raises InputError for padding on the right."""
        tokens = self.prompt[0].shape[2]
        refuse_right_padding(mask, tokens)
        self._find_first(mask, tokens)
        return self.first

    def begin(
        self,
        query: Tensor,
        scaling: float,
        mask: Tensor | None,
        output: OutputProjection | None = None,
        stay: Staying | None = None,
    ) -> None:
        """Store the first update: fit what the plan leaves open, drop tokens, and find the sinks.

        The sinks are each row's first real tokens, so that padding on the left changes nothing. ``mask`` is the
        attention mask [B or 1, 1, n, T]: a row's first real token is the first that its last query may see. ``query``
        [B, Hq, m, D]: all of the prompt's, or the last of them. ``stay``: which tokens stay, if it is known already.
        """
        if not self.waits:  # some models compute the attention of a layer in two parts
            return
        first, rows = self.first_of(mask), []
        self._whole = self._starts_whole()
        if self.plan.watches and not self._whole:
            hidden = None if self.given is None else self.given.take(self.index)
            rows = observed(self.plan, *self.prompt, query, scaling, first, output, self.turn, hidden)
        if stay is None and (said := staying(self.plan, rows, self.prompt[0].shape[2])) is not None:
            (stay,) = said
        states, self._prompt = self.prompt, None
        if stay is not None:
            states, rows = self._drop(states, stay), narrowed(rows, stay)
        self.prompt_length = states[0].shape[2]
        self._store(states, rows)

    def _store(self, states: tuple[Tensor, Tensor], rows: Rows) -> None:
        """All tokens so far."""
        self.key_side, self.value_side = (
            self._side(kind, each, self._codec(kind, each, rows)) for kind, each in zip(KINDS, states, strict=True)
        )
        self._put_whole(states, 0, states[0].shape[2])
        self._pack()
        self.kernels = usable(self)

    def _starts_whole(self) -> bool:
        """Whether nothing is old yet, and nothing is chosen from the prompt that would be needed later.

        Then compression could save nothing, and what it needs itself would cost.
        """
        later = self.keeps or (self.plan.choice is None and not self.is_static)
        return later and self.plan.tokens is None and not self._has_old()

    def _has_old(self) -> bool:
        return self.length - min(self.firsts, default=0) > self.sinks + self.recent_window

    def _drop(self, states: tuple[Tensor, Tensor], stay: Staying) -> tuple[Tensor, Tensor]:
        """The states of the tokens that stay."""
        assert self.plan.tokens is not None
        tokens, self.length = states[0].shape[2], stay.slots.shape[1]
        self.slots = Slots(stay, tokens, bool(self.plan.kinds))
        self.first = self.slots.first
        if self.plan.tokens.policy.slides and not self.keeps:
            self.slots.reach = (self.length - self.first - self.sinks).clamp(min=self.recent_window)
        self._place_sinks()
        return taken(states[0], stay.slots.clamp(min=0)), taken(states[1], stay.slots.clamp(min=0))

    def _codec(self, kind: Kind, states: Tensor, rows: Rows) -> Codec:
        """Of all heads, [1 or B, H, ..]."""
        if self._whole or kind not in self.plan.kinds:
            return Whole(states.shape[3])
        return arranged(for_prompt(self.plan, rows, kind, states), states.device)

    def _side(self, kind: Kind, states: Tensor, codec: Codec) -> Side:
        """The side with everything stored but residuals of whole tokens outside of the window."""
        coding = Coding(codec, self._turn(codec) if kind == "key" else None)
        positions = self.positions(torch.arange(states.shape[2], device=states.device))
        rows = coding.encode(states, positions)
        buffer = self._buffer(rows, codec)
        buffer.reserve(rows.shape[2])
        buffer.put(rows, 0)
        last = min(states.shape[2], self.recent_window + self.spare)
        tail = slice(states.shape[2] - last, None)
        residuals = coding.residual(states[:, :, tail], rows[:, :, tail], positions[:, tail])
        window = self._window(residuals, states.shape[2])
        count = self.sink_count + (0 if self.extra is None else self.extra.shape[1])
        return Side(coding, buffer, window, states.new_zeros(*states.shape[:2], count, codec.residual_width))

    def _turn(self, codec: Codec) -> Table | None:
        """How the keys turn that this codec stores, if it stores them before RoPE."""
        if not without_integers(codec).before_rope:
            return None
        if self.turn is None:
            raise InputError(f"layer {self.index}'s keys before RoPE are not known to this cache; make it of a model")
        if self.slots is not None:
            raise InputError(
                "keys that are stored before RoPE need each token's own position, and a token policy moves tokens "
                "together; use a codec of keys after RoPE with it"
            )
        self.turn.reach(self.columns)
        return self.turn.table

    def _buffer(self, like: Tensor, codec: Codec) -> Buffer:
        if codec.block:
            return Packed(like, codec, self.sinks, self.recent_window + self.spare)
        return Growing(like, room_of(codec.width, like.dtype.itemsize))

    def _window(self, residuals: Tensor, length: int) -> Window:
        if self.keeps:
            return Kept(residuals, self.recent_window)
        return Ring(residuals, length, self.recent_window, self.spare)

    # ------------------------------------------------------------ what comes after it

    def follow(self, handle: Handle, mask: Tensor | None) -> None:
        """Store the sinks among the tokens that just came, and pack; ``mask`` is one of slots (`slot_mask`)."""
        before = self.length - handle.new
        if handle.new > 1:
            refuse_right_padding(mask, self.length)
        if before < self._sought:
            self._find_first(mask, self.length)
            self._put_residuals(handle.residuals, before, handle.new)
        if self.key_side.turn is not None:
            handle.store()
        if not self.keeps:
            self._pack()

    def done(self) -> None:
        """The attention of the tokens that came last was computed."""
        self._unattended = False
        if self.offloading:
            self.offload()

    def slot_mask(self, mask: Tensor | None, new: int) -> Tensor | None:
        """A mask of slots [B or 1, 1, new, slots] from one of positions [B or 1, 1, new, T]."""
        return mask if self.slots is None else self.slots.mask(mask, lambda: self.causal(new))

    def causal(self, new: int) -> Tensor:
        """bool[1, 1, new, slots]: which slots the last ``new`` tokens may see."""
        asked = self.length - new + torch.arange(new, device=self.device)
        return (torch.arange(self.columns, device=self.device) <= asked[:, None])[None, None]

    def window_start(self, count: Any) -> Any:
        """The slot of the first of the window's residuals, ``count`` of them, that new queries may see."""
        return self.length - count

    def near(self, asked: Tensor, stored: Tensor, new: int) -> Tensor | None:
        """bool[m, w]: which of the window's slots are whole for which of the last ``new`` tokens; None: all."""
        if self.keeps or new == 1:
            return None
        near = asked[:, None] - stored < self.recent_window
        return near if self.stepwise else near | (stored >= self.length - new)

    def unbroken(self) -> int | None:
        """How many tokens may come in one update as if they came one by one, with ``stepwise``; None: any number."""
        if self.slots is not None and self.slots.reach is not None:
            return 1
        if self.keeps:
            return None
        if self._whole:  # until the first is old
            return max(1, min(self.firsts, default=0) + self.sinks + self.recent_window - self.length)
        return min((each for side in self.sides if (each := side.buffer.unbroken()) is not None), default=None)

    def _slide(self, new: int) -> None:
        """Drop what is out of a sliding policy's reach for all of the new tokens."""
        left = None if self.slots is None else self.slots.slide(self.first, self.sinks, new)
        if self.slots is None or left is None:
            return
        for side in self.sides:
            side.buffer.take(left.clamp(min=0))
            if isinstance(side.window, Ring):  # it slides only where generated tokens are not kept
                side.window.shift(self.length - left.shape[1])
        self.length = left.shape[1]
        self.first = self.slots.first
        self._place_sinks()

    # ------------------------------------------------------------ whole tokens

    def _find_first(self, mask: Tensor | None, length: int) -> None:
        """Where each row's real tokens begin."""
        if mask is not None:
            self.first = first_seen(mask, length).expand(self.batch).clone()
        self._place_sinks(mask is None and self.slots is None)

    def _place_sinks(self, at_zero: bool = False) -> None:
        self.firsts = [0] * self.batch if at_zero else self.first.tolist()
        earliest, latest = min(self.firsts, default=0), max(self.firsts, default=0)
        self.sinks_start = earliest if earliest == latest else None
        self.sinks_end, self._sought = latest + self.sinks, latest + max(self.sinks, 1)
        room = max(self.sink_count, min(self.sinks, self.length - earliest))
        if room > self.sink_count and hasattr(self, "key_side"):
            for side in self.sides:
                side.make_room(self.sink_count, room)
        self.sink_count = room

    def sink_columns(self) -> Tensor:
        """int64[B, sinks]: the slot of each row's sinks."""
        return self.first[:, None] + torch.arange(self.sink_count, device=self.first.device)

    def whole_columns(self) -> Tensor:
        """int64[B, K]: the slots of whole tokens outside of the window, sinks first; negative for none."""
        return self.sink_columns() if self.extra is None else torch.cat([self.sink_columns(), self.extra], dim=1)

    def _put_whole(self, states: tuple[Tensor, Tensor], before: Any, new: int) -> None:
        """Residuals of the whole tokens among states [B, H, new, n] from slot ``before`` on."""
        columns = self.whole_columns()
        if not columns.shape[1]:
            return
        slot = columns - before
        for side, each in zip(self.sides, states, strict=True):
            tokens, positions = taken(each, slot.clamp(0, new - 1)), self.positions(columns)
            self._put(side, side.residual(tokens, side.encode(tokens, positions), positions), slot, new)

    def _put_residuals(self, residuals: Any, before: Any, new: int) -> None:
        """The same, where the residuals of all of them are known."""
        slot = self.whole_columns() - before
        for side, each in zip(self.sides, residuals, strict=True):
            if slot.shape[1]:
                self._put(side, taken(each, slot.clamp(0, new - 1)), slot, new)

    def _put(self, side: Side, residuals: Tensor, slot: Tensor, new: int) -> None:
        arrived = ((slot >= 0) & (slot < new))[:, None, :, None]
        side.whole = torch.where(arrived, residuals, side.whole)

    def _pack(self) -> None:
        for side in self.sides:
            side.buffer.pack(self.firsts)

    # ------------------------------------------------------------ as transformers asks

    def tensors(self) -> list[Tensor]:
        """Every tensor that holds tokens, and what they are read by."""
        if not hasattr(self, "key_side") or not self.is_initialized:
            return []
        slots = [] if self.slots is None else self.slots.tensors()
        return [*self.key_side.tensors(), *self.value_side.tensors(), self.first, *slots]

    def full_nbytes(self) -> int:
        """Bytes of as many whole keys and values, without growth space."""
        if not self.is_initialized:
            return 0
        elements = sum(heads * n for heads, n in self.shapes.values())
        return self.batch * elements * (int(self.length) + self.dropped) * self.dtype.itemsize

    def get_seq_length(self) -> int:
        """How many tokens have come."""
        return self.length + self.dropped

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(length, offset) of the keys that a mask for ``query_length`` new tokens must cover."""
        # transformers before 5.4 passes the tensor of the new positions
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """-1: it grows without limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.10

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -``tokens_to_remove`` tokens (a positive number: all but so many, as before 5.10).

        Exact: what is left is as if they had never come. Raises InputError if that cannot be.
        """
        count = self.removable(tokens_to_remove)
        if count:
            self._crop(count)

    def _crop(self, count: int) -> None:
        self.length -= count
        self.prompt_length = min(self.prompt_length, self.length)
        if self.slots is not None:
            self.slots.crop(self.length)
        for side in self.sides:
            side.buffer.crop(self.length)
            side.window.crop(count, self.length)

    def removable(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would forget. Raises InputError if it cannot."""
        length = int(self.get_seq_length())
        count = max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, length)
        if not count:
            return 0
        slots = int(self.length)
        most = slots - max(side.buffer.fixed for side in self.sides)
        oldest = self._oldest()  # what moves into the recent window from behind must be whole
        if oldest > 0 and self.recent_window and not all(side.codec.residual_width == 0 for side in self.sides):
            most = min(most, slots - oldest - self.recent_window)
        if self.dropped:  # a prompt cut short would have kept others
            slides = self.slots is not None and self.slots.reach is not None
            most = min(most, 0 if slides else slots - self.prompt_length)
        if count > most:
            raise InputError(
                f"the last {count} tokens cannot be taken back, only {max(0, most)}: what would move into the recent "
                f"window of {self.recent_window} is pruned already; take back no more tokens than the window has, "
                f"{CROP} at most, or start a new cache"
            )
        return count

    def _oldest(self) -> int:
        """The slot of the first token whose residual is held in the window."""
        window = self.key_side.window
        return self.length - window.held if isinstance(window, Ring) else self._kept_from()

    def _kept_from(self) -> int:
        return max(0, self.prompt_length - self.recent_window - self.spare)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: row b becomes what row beam_idx[b] was."""
        self._each_row(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given rows."""
        self._each_row(lambda tensor: tensor[indices.to(tensor.device)])

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if not hasattr(self, "key_side"):
            return
        self.first = change(self.first)
        self.batch = len(self.first)
        self.firsts = followed(self.firsts, change, self.batch)
        if self.slots is not None:
            self.slots.each(change)
        for side in self.sides:
            side.each_row(change)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._move(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        if hasattr(self, "key_side"):
            self.first = change(self.first)
            if self.slots is not None:
                self.slots.each(change)
            for side in self.sides:
                side.move(change)


def shapes_of(keys: Tensor, values: Tensor) -> Shapes:
    """Kind -> KV heads, and channels of a token, of keys and values [B, H, n, D]."""
    return {kind: (each.shape[1], each.shape[3]) for kind, each in zip(KINDS, (keys, values), strict=True)}
