"""The graph of a folded model, in ONNX's own operators, with its cache as inputs and outputs.

ONNX Runtime GenAI gives keys and values caches of one width. So a token's key and value lie one behind the other in
one row, and half of the row is what the cache calls a key, half what it calls a value; attention takes the row apart as
it was put together. A row of an odd width gets a zero more.

Inputs and outputs, as GenAI names them, with N of a layer: ``input_ids`` and ``position_ids`` int64 [batch, tokens],
``attention_mask`` int64 [batch, total]; ``past_key_values.N.key`` and ``.value`` float32 [batch, KV heads, past, half];
``logits`` float32 [batch, tokens, vocabulary], ``present.N.key`` and ``.value`` [batch, KV heads, total, half].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray[Any, Any]

OPSET, IR = 23, 11  #: the first with attention, RoPE and RMS norms, and its file format


def half_width(config: Any) -> int:
    """Numbers of a half of what is cached of a token by a KV head."""
    return -(-int(config.head_dim + config.v_head_dim) // 2)


def write_graph(model: Any, path: Path) -> None:
    """Write a MiMo-V2-Flash of dense MLPs with silu and full attention, in float32, its weights in ``path``.data."""
    import onnx
    from onnx import TensorProto, helper

    config, graph = model.config, Graph(model.state_dict())
    x = graph.add("Gather", graph.weight("model.embed_tokens.weight"), "input_ids")
    for name, angles in zip(("cos", "sin"), _angles(model), strict=True):
        graph.hold(name, angles)
    mask = _mask(graph)
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}."
        normed = graph.norm(x, f"{at}input_layernorm", config)
        x = graph.add("Add", x, _attention(graph, config, index, normed, mask))
        normed = graph.norm(x, f"{at}post_attention_layernorm", config)
        gate = graph.linear(normed, f"{at}mlp.gate_proj")
        gate = graph.add("Mul", gate, graph.add("Sigmoid", gate))
        inner = graph.add("Mul", gate, graph.linear(normed, f"{at}mlp.up_proj"))
        x = graph.add("Add", x, graph.linear(inner, f"{at}mlp.down_proj"))
    x = graph.norm(x, "model.norm", config)
    if config.tie_word_embeddings:
        turned = graph.add("Transpose", graph.weight("model.embed_tokens.weight"), perm=[1, 0])
        graph.add("MatMul", x, turned, out="logits")
    else:
        graph.linear(x, "lm_head", out="logits")

    def tensors(kind: int, **shapes: tuple[Any, ...]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]

    new, held = ("batch", "tokens"), ("batch", config.num_key_value_heads)
    whole = tensors(TensorProto.INT64, input_ids=new, attention_mask=("batch", "total"), position_ids=new)
    names = [f"{index}.{kind}" for index in range(config.num_hidden_layers) for kind in ("key", "value")]
    half = half_width(config)
    past = {f"past_key_values.{name}": (*held, "past", half) for name in names}
    present = {f"present.{name}": (*held, "total", half) for name in names}
    made = helper.make_graph(
        graph.nodes,
        "folded",
        [*whole, *tensors(TensorProto.FLOAT, **past)],
        tensors(TensorProto.FLOAT, logits=(*new, config.vocab_size), **present),
        list(graph.held.values()),
    )
    proto = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="grace-opt"
    )
    weights = f"{path.name}.data"
    onnx.save(proto, path, save_as_external_data=True, location=weights, size_threshold=1024)
    path.with_name(weights).chmod(path.stat().st_mode)  # onnx lets nobody else read it


class Graph:
    """Nodes in their order, and the constants that they read, weights among them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.nodes: list[Any] = []
        self.held: dict[str, Any] = {}

    def hold(self, name: str, array: Array) -> str:
        """A constant by its name, which this returns."""
        from onnx import numpy_helper

        self.held[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        """A constant int64 [n]."""
        return self.hold("_".join(map(str, ("integers", *values))), np.array(values, dtype=np.int64))

    def weight(self, name: str) -> str:
        return self.hold(name, self.state[name].float().cpu().numpy())

    def add(self, operator: str, *given: str, out: str = "", **attributes: Any) -> str:
        """A node of one output, whose name this returns."""
        return self.split(operator, *given, outs=[out or f"{operator}_{len(self.nodes)}"], **attributes)[0]

    def split(self, operator: str, *given: str, outs: list[str], **attributes: Any) -> list[str]:
        """A node of several outputs."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(given), outs, **attributes))
        return outs

    def linear(self, x: str, name: str, out: str = "") -> str:
        """x W^T + b, as torch holds W; b where there is one."""
        weight = self.hold(f"{name}.weight", self.state[f"{name}.weight"].float().cpu().numpy().T)
        if f"{name}.bias" not in self.state:
            return self.add("MatMul", x, weight, out=out)
        return self.add("Add", self.add("MatMul", x, weight), self.weight(f"{name}.bias"), out=out)

    def norm(self, x: str, name: str, config: Any) -> str:
        return self.add("RMSNormalization", x, self.weight(f"{name}.weight"), axis=-1, epsilon=config.rms_norm_eps)


def _mask(graph: Graph) -> str:
    """What a token sees, bool [batch, 1, tokens, total]: itself and what is before it, where that is not padding."""
    from onnx import TensorProto

    zero, one = (graph.hold(f"number_{each}", np.array(each, dtype=np.int64)) for each in (0, 1))
    tokens = graph.add("Squeeze", graph.add("Shape", "input_ids", start=1, end=2))
    total = graph.add("Squeeze", graph.add("Shape", "attention_mask", start=1, end=2))
    places = graph.add("Range", zero, total, one)
    asking = graph.add("Range", graph.add("Sub", total, tokens), total, one)
    before = graph.add("LessOrEqual", places, graph.add("Unsqueeze", asking, graph.integers(1)))
    real = graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    return graph.add("And", before, graph.add("Unsqueeze", real, graph.integers(1, 2)))


def _attention(graph: Graph, config: Any, index: int, x: str, mask: str) -> str:
    """Attention of a layer over the cache and the new tokens, which it adds to the cache."""
    at, last = f"model.layers.{index}.self_attn.", graph.integers(-1)

    def heads(part: str) -> str:
        """Projected, [batch, heads, tokens, width]."""
        count = config.num_attention_heads if part == "q" else config.num_key_value_heads
        shape = graph.integers(0, 0, count, -1)
        return graph.add(
            "Transpose", graph.add("Reshape", graph.linear(x, f"{at}{part}_proj"), shape), perm=[0, 2, 1, 3]
        )

    query, key = (graph.add("RotaryEmbedding", heads(part), "cos", "sin", "position_ids") for part in ("q", "k"))
    row = graph.add("Concat", key, heads("v"), axis=-1)
    if (config.head_dim + config.v_head_dim) % 2:
        row = graph.add("Pad", row, graph.integers(0, 1), "", last)
    halves = graph.split("Split", row, outs=[f"half.{index}.{i}" for i in (0, 1)], axis=-1, num_outputs=2)
    held = [
        graph.add("Concat", f"past_key_values.{index}.{kind}", half, axis=2, out=f"present.{index}.{kind}")
        for kind, half in zip(("key", "value"), halves, strict=True)
    ]
    rows, end = graph.add("Concat", *held, axis=-1), config.head_dim + config.v_head_dim
    bounds = [graph.integers(each) for each in (0, config.head_dim, end)]
    keys, values = (graph.add("Slice", rows, bounds[i], bounds[i + 1], last) for i in (0, 1))
    out = graph.add("Attention", query, keys, values, mask, scale=config.head_dim**-0.5)
    flat = graph.add("Reshape", graph.add("Transpose", out, perm=[0, 2, 1, 3]), graph.integers(0, 0, -1))
    return graph.linear(flat, f"{at}o_proj")


def _angles(model: Any) -> tuple[Array, Array]:
    """Cosines and sines of RoPE at all positions of the context, float32 [positions, head_dim / 2]."""
    import torch

    positions = torch.arange(model.config.max_position_embeddings)[None]
    cos, sin = model.model.rotary_emb.cpu()(torch.zeros(1), positions, layer_type="full_attention")
    half = model.config.head_dim // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
