"""Run a Hugging Face model over text and collect the channel graph of every layer and KV head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError, did_you_mean
from grace_opt.graphs import GraphBundle, Protection
from grace_opt.models.config import config_sha256, text_config
from grace_opt.models.texts import token_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from grace_opt.graphs.accumulate import GraphSums
    from grace_opt.graphs.observed import OutputProjection
    from grace_opt.models.given import Given
    from grace_opt.models.rotary import Rotary

OBJECTIVES = ("logit", "centered", "attention")
VALUE_OBJECTIVES = ("norm", "read", "output")


@dataclass(frozen=True)
class Calibration:
    """Options of `calibrate`.

    Attributes:
        tokens: how many tokens of text to run, rounded down to whole windows.
        window: tokens of one forward pass, each a prompt of its own; None for 1024, or fewer where ``tokens``
            or the model's context are fewer.
        observation_window: the last queries of each window, whose logits count (ThinK and GRACE: 32).
        recent_window: the last keys of each window, left out because the cache keeps them whole.
        sinks: the first keys of each window, left out for the same reason.
        protection: the salient channels to protect, or None for none.
        objective: what the graphs of keys measure: ``logit``, ``centered`` or ``attention`` (with ``spans``).
        value_objective: what graphs of values measure, ``norm``, ``read`` or ``output``; None for no such graphs.
        rope_pairs: tie the two key channels of each RoPE pair, for exports (`grace_opt.graphs.rope`).
        lowrank: also make the Gram matrices that joint ranks are fitted to (`grace_opt.graphs.joint`).
    """

    tokens: int = 4096
    window: int | None = None
    observation_window: int = 32
    recent_window: int = 32
    sinks: int = 4
    protection: Protection | None = field(default_factory=Protection)
    objective: str = "attention"
    spans: int | None = 2
    value_objective: str | None = None
    rope_pairs: bool = False
    lowrank: bool = False

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("value_objective", VALUE_OBJECTIVES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"unknown {name} {value!r}{did_you_mean(value, known)}")
        for name in ("tokens", "window", "observation_window", "spans"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("recent_window", "sinks"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")

    def window_for(self, context: int | None) -> int:
        """The window to use with a model of ``context`` positions. Raises InputError if none will do."""
        window = self.window or min(1024, self.tokens, context or 1024)
        if context and window > context:
            raise InputError(f"a window of {window} tokens is longer than the model's context of {context}")
        if self.sinks + self.recent_window >= window:
            raise InputError(
                f"a window of {window} tokens has no prunable key between {self.sinks} sinks and a recent "
                f"window of {self.recent_window}; make the window longer or those shorter"
            )
        if self.observation_window > window:
            raise InputError(
                f"the observation window of {self.observation_window} is longer than a window of {window} tokens"
            )
        return window


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    pieces: Iterable[str],
    options: Calibration | None = None,
    *,
    model_name: str | None = None,
    text_name: str = "unnamed",
    progress: Callable[[int, int], None] | None = None,
) -> GraphBundle:
    """The graphs of a model on a text, under the objectives of ``options`` (`grace_opt.graphs.objectives`).

    Queries, keys and values are taken after RoPE (and after QK norm, where a model has one) by an attention function
    registered with transformers; the model's code is not touched and its attention function is set back
    afterwards. Layers with sliding-window attention get no graph: the cache leaves them as they are. The
    language-model head is not run. Memory does not depend on the number of tokens.

    Args:
        pieces: the text, in pieces (see `grace_opt.models.texts.read_pieces`).
        progress: called with (tokens done, tokens asked for) after each window.

    Raises:
        InputError: for a text shorter than a window, or a model whose attention cannot be observed.
    """
    import torch

    from grace_opt.graphs.accumulate import GraphSums
    from grace_opt.models.attention import attending_with, observing, require_attention_interface
    from grace_opt.models.inputs import input_device, require_rows
    from grace_opt.models.rotary import rotary_of

    options = options or Calibration()
    config = text_config(model.config)
    require_attention_interface(model)
    window = options.window_for(getattr(config, "max_position_embeddings", None))
    graphs = GraphSums(options.objective, options.value_objective)
    capture = _Capture(graphs, options)
    if options.lowrank:
        rotary_of(model).layers()  # before the model is watched, as it runs the model
    done = 0
    for ids in token_windows(pieces, tokenizer, options.tokens, window):
        require_rows(model, ids)
        # Only while it runs: texts and progress are the caller's, who may run the model too.
        with torch.inference_mode(), attending_with(model, observing(capture)), capture.looking(model):
            model.base_model(input_ids=torch.tensor([ids], device=input_device(model)), use_cache=False)
        done += len(ids)
        if not graphs.windows:
            raise InputError(_nothing_captured(model, capture))
        if set(graphs.windows.values()) != {done // window}:
            raise InputError(
                f"{type(model).__name__} does not run each of its layers once in a pass, which is not supported"
            )
        if progress is not None:
            progress(done, options.tokens)
    heads, kv_heads, head_dim = capture.geometry
    metadata = {
        "model": model_name or str(model.config.name_or_path) or str(config.model_type),
        "config_sha256": config_sha256(model.config),
        "objective": options.objective,
        "stage": "post_rope",
        "text": text_name,
        "tokens": done,
        "windows": done // window,
        "window": window,
        "observation_window": options.observation_window,
        "recent_window": options.recent_window,
        "sinks": options.sinks,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "value_head_dim": capture.value_head_dim,
        "softmax_scale": repr(capture.scaling),
    }
    if options.objective == "attention" and options.spans is not None:
        metadata["spans"] = options.spans
    if options.value_objective is not None:
        metadata["value_objective"] = options.value_objective
    if options.protection is not None:
        metadata["protection_multiple"] = options.protection.multiple
        metadata["protection_at_least"] = options.protection.at_least
        metadata["protection_at_most"] = options.protection.at_most
    groups = None
    if options.rope_pairs:
        from grace_opt.graphs.rope import rope_pairs

        groups = rope_pairs(model, capture.attention, head_dim)
    joint = {} if capture.joint is None else capture.joint.found()
    return GraphBundle(
        graphs.heads(options.protection, groups), {name: str(value) for name, value in metadata.items()}, joint
    )


class _Capture:
    """What the attention function hands its queries, keys and values to."""

    def __init__(self, graphs: GraphSums, options: Calibration) -> None:
        from grace_opt.graphs.joint import JointSums

        self.graphs = graphs
        self.options = options
        self.sliding_layers: set[int] = set()
        self.geometry = (0, 0, 0)
        self.value_head_dim = 0
        self.attention: Any = None
        self.scaling = 0.0
        self.outputs: dict[int, OutputProjection] = {}  # each asked once, for all windows
        self.turns: Rotary | None = None
        self.given: Given | None = None
        self.joint = JointSums() if options.lowrank else None

    @contextmanager
    def looking(self, model: PreTrainedModel) -> Iterator[None]:
        """While it lasts, what joint ranks ask of the model is seen."""
        if self.joint is None:
            yield
            return
        from grace_opt.models.given import Given
        from grace_opt.models.rotary import rotary_of

        self.turns = rotary_of(model)
        with Given(model) as self.given:
            yield

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        arguments: dict[str, Any],
    ) -> None:
        from grace_opt.graphs.observed import Observed, OutputProjection
        from grace_opt.models.rotary import Turn

        if arguments.get("sliding_window") is not None:
            self.sliding_layers.add(module.layer_idx)
            return
        output = self.outputs.setdefault(module.layer_idx, OutputProjection(module, query.shape[1], value))
        hidden = None if self.given is None else self.given.take(module.layer_idx)
        observed = Observed(
            query[0, :, -self.options.observation_window :],
            key[0],
            value[0],
            scaling,
            self.options.sinks,
            self.options.recent_window,
            output,
            self.options.spans,
            None if self.turns is None else Turn(self.turns, module.layer_idx),
            None if hidden is None else output.inputs(hidden[0]),
        )
        self.geometry = (query.shape[1], key.shape[1], key.shape[-1])
        self.attention = module
        self.value_head_dim = value.shape[-1]
        self.scaling = scaling
        self.graphs.add(module.layer_idx, observed)
        if self.joint is not None:
            self.joint.add(module.layer_idx, observed)


def _nothing_captured(model: PreTrainedModel, capture: _Capture) -> str:
    if capture.sliding_layers:
        return (
            f"every attention layer of {type(model).__name__} uses a sliding window, and those caches are already "
            "short; channel pruning of sliding-window layers is not supported yet"
        )
    return (
        f"{type(model).__name__} does not use transformers' attention interface, so its queries and keys "
        "cannot be observed; use a model that does"
    )
