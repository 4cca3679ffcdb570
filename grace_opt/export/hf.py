"""``hf``: a stock checkpoint of transformers whose values are fewer numbers, folded into its projections.

What a mask makes of a value is affine: z = x A + a is stored, and read as z M + c. Weights of attention sum to 1, so
A and a go into ``v_proj``, M into ``o_proj``; c becomes a value channel more, which is 1 for every token. Keys cannot
be folded by head (RoPE stands between), and there is no window: the prompt sees narrow values too, and its own.

transformers' Llama has one width for keys and values, and MiMo-V2-Flash has two. With full attention and dense MLPs in
every layer the two are the same function, so the checkpoint calls itself that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grace_opt.errors import InputError
from grace_opt.export.abilities import Abilities
from grace_opt.export.card import card
from grace_opt.export.checkpoint import save_checkpoint
from grace_opt.export.target import Checked, Record, Source, Target
from grace_opt.files import write_text
from grace_opt.models.config import text_config
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from torch import Tensor

    from grace_opt.compression.codec import Codec
    from grace_opt.compression.mask import KVMask
    from grace_opt.evaluate.capture import Captured

FOLDS = Abilities(
    models=("llama", "mistral", "qwen2"),  # whose layers are those of MiMo-V2-Flash but for names and biases
    sliding_layers=False,
    kinds=("value",),
    one_width=True,
    readouts=("none", "static"),  # without a window static ones lose more than zeros (docs/results/export.md)
    integers=False,
    token_policies=False,
    choices=False,
    joint=False,
    whole_tokens=False,
    prefill="pruned",
    generated="prune",
)

USE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR REPOSITORY")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
"""


class HF(Target):
    """A stock model with narrower values."""

    name = "hf"
    expresses = "values alone, by channels or low rank of one width; no window, no integers; far from usable at a half"
    runtime = "transformers"
    tested = ("5.23.0",)
    can = FOLDS

    def measure(self, source: Source) -> Record:
        """Of the folded model, prompt and all."""
        from grace_opt.export.measure import Run, measured

        model = folded(source)
        config = model.config
        width = config.num_key_value_heads * (config.head_dim + config.v_head_dim) * source.model.dtype.itemsize

        def run(captured: Captured) -> Run:
            chunk = model(input_ids=captured.ids).logits[0, captured.prefix :].float().log_softmax(-1)
            return Run([chunk], captured.prefix * config.num_hidden_layers * width)

        return measured(source, 1, run)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        save_checkpoint(source, folded(source), folder)
        what = (
            f"{source.name} with values of fewer channels, folded into its projections: a stock checkpoint, with no "
            "code of its own. Its class is that of MiMo-V2-Flash, with full attention and dense MLPs, because that has "
            "a width of values of its own. No token stays whole."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=[]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Beside the model itself with each value replaced by what it is read as: our cache runs prompts whole."""
        import torch
        from transformers import AutoModelForCausalLM

        from grace_opt.models.inputs import input_device

        loaded: Any = AutoModelForCausalLM
        device = input_device(source.model)
        model = loaded.from_pretrained(folder, dtype=source.model.dtype).to(device).eval()
        prompt = torch.tensor([ids], device=device)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        with torch.inference_mode():
            run = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        tokens = run.sequences[0, len(ids) :].tolist()
        name = f"transformers {distribution_version('transformers')}"
        return as_replaced(source, ids, name, tokens, torch.cat(run.logits).float().log_softmax(-1))


class Unbiased(HF):
    """The same for runtimes whose own MiMo-V2-Flash has no biases, one unscaled RoPE and silu.

    Attributes:
        program: that runs it, in sentences.
    """

    program: ClassVar[str]
    can = replace(FOLDS, models=("llama", "mistral"), readouts=("none",))

    def supports(self, mask: KVMask, config: Any) -> bool | str:
        text = text_config(config)
        rope, act = getattr(text, "rope_parameters", None) or {}, getattr(text, "hidden_act", "silu")
        if getattr(text, "attention_bias", False) or rope.get("rope_type", "default") != "default" or act != "silu":
            return "has no biases, no scaled RoPE and silu alone for this fold; use the target hf"
        return super().supports(mask, config)

    def folded(self, source: Source) -> Any:
        """The folded model. Raises InputError if it needs a bias: the runtime would read past it without a word."""
        model = folded(source)
        for name in model.state_dict():
            if name.endswith(".bias"):
                raise InputError(
                    f"{self.program} has no place for {name}, which the model or the read-out of this mask needs; "
                    "solve with --readout none, or use the target hf"
                )
        return model


def as_replaced(
    source: Source, ids: list[int], runtime: str, tokens: list[int], told: Tensor | Sequence[float | None]
) -> Checked:
    """Tokens that a folded model decoded, beside the model itself with each value replaced by what it is read as.

    ``told``: log-probabilities before each token [n, vocabulary], or those of the tokens, where they are known.
    """
    import torch

    from grace_opt.models.inputs import input_device

    row = torch.tensor([[*ids, *tokens[:-1]]], device=input_device(source.model))
    with torch.inference_mode(), values_replaced(source):
        logits = source.model(input_ids=row).logits[0, len(ids) - 1 :]
    ours = logits.float().log_softmax(-1)
    own = ours.gather(1, torch.tensor(tokens, device=ours.device)[:, None])[:, 0]
    if isinstance(told, torch.Tensor):
        off = [float((ours - told.to(ours)).abs().max())]
    else:
        off = [abs(float(one) - score) for one, score in zip(own, told, strict=True) if score is not None]
    return Checked(runtime, tokens, float((ours.amax(-1) - own).max()), max(off, default=None))


def folded(source: Source) -> Any:
    """The model with its values folded, in its dtype, on its device. Raises InputError for weights of another form."""
    import torch
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    ours: Any = source.model
    state = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    maps = {
        plan.index: [_maps(codec, source.mask.head_dim) for codec in plan.codecs["value"]] for plan in source.mask.plan
    }
    constant = any(bool(each[3].any()) for heads in maps.values() for each in heads)
    biased = constant or any(bool(each[1].any()) for heads in maps.values() for each in heads)
    biased = biased or any(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in state)
    for index, heads in maps.items():
        at = f"model.layers.{index}.self_attn."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if f"{at}{part}.weight" not in state or (part == "o_proj" and f"{at}{part}.bias" in state):
                raise InputError(f"{source.name} has another {part} than can be folded; use the target hf-generate")
        _fold(state, at, heads, constant, biased)
    config = MiMoV2FlashConfig(**_config(text_config(ours.config), maps, constant, biased))
    with torch.device("meta"):
        model: Any = MiMoV2FlashForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise InputError(
            f"{source.name} has other weights than can be folded ({', '.join([*missing, *unexpected][:3])}); use the "
            "target hf-generate"
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(ours.device)  # buffers that no checkpoint has
    model.generation_config = ours.generation_config
    return model.eval()


def _fold(state: dict[str, Any], at: str, heads: Sequence[Any], constant: bool, biased: bool) -> None:
    """Put the maps of one layer's KV heads into its projections. float64 inside."""
    import torch

    values, out = state[f"{at}v_proj.weight"], state[f"{at}o_proj.weight"]
    bias = state.get(f"{at}v_proj.bias", values.new_zeros(len(values)))
    n = len(values) // len(heads)
    group = out.shape[1] // n // len(heads)
    rows, offsets, columns = [], [], []
    for head, (matrix, offset, back, added) in enumerate(heads):
        part = slice(head * n, (head + 1) * n)
        one = torch.ones(int(constant), dtype=torch.float64)
        rows += [matrix.mT @ values[part].double().cpu(), torch.zeros(len(one), values.shape[1], dtype=torch.float64)]
        offsets += [bias[part].double().cpu() @ matrix + offset, one]
        for query in range(head * group, (head + 1) * group):
            weight = out[:, query * n : (query + 1) * n].double().cpu()
            columns += [weight @ back.mT, (weight @ added)[:, None][:, : len(one)]]
    state[f"{at}v_proj.weight"] = torch.cat(rows).to(values)
    state[f"{at}o_proj.weight"] = torch.cat(columns, dim=1).to(out)
    if biased:
        state[f"{at}v_proj.bias"] = torch.cat(offsets).to(values)
        for name in ("q_proj", "k_proj"):
            zeros = values.new_zeros(len(state[f"{at}{name}.weight"]))
            state.setdefault(f"{at}{name}.bias", zeros)


def _maps(codec: Codec, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A codec as z = x A + a and x = z M + c: A [n, d], a [d], M [d, n], c [n], float64."""
    import torch

    exact = codec.sized(n).mapped(lambda each: each.double().cpu() if each.is_floating_point() else each.cpu())
    units, rows = (torch.cat([torch.zeros(1, k), torch.eye(k)]).double() for k in (exact.n, exact.width))
    stored, read = exact.encode(units), exact.read(rows, None)
    return stored[1:] - stored[0], stored[0], read[1:] - read[0], read[0]


def _config(config: Any, maps: dict[int, Any], constant: bool, biased: bool) -> dict[str, Any]:
    """The fields of a MiMo-V2-Flash that is this model."""
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    heads = next(iter(maps.values()))
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    return {name: getattr(config, name) for name in same} | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "v_head_dim": heads[0][0].shape[1] + int(constant),
        "attention_bias": biased,
        "attention_value_scale": 1.0,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "mlp_layer_types": ["dense"] * config.num_hidden_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
    }


@contextmanager
def values_replaced(source: Source) -> Iterator[None]:
    """While it lasts, the model's values are what the mask's codecs read them as."""
    import torch

    hooks = []
    model: Any = source.model
    for plan in source.mask.plan:
        codecs = [codec.sized(source.mask.head_dim) for codec in plan.codecs["value"]]

        def replaced(module: Any, given: Any, values: Tensor, codecs: Sequence[Codec] = codecs) -> Tensor:
            heads = values.unflatten(-1, (len(codecs), -1)).float()  # type: ignore[no-untyped-call]
            parts = [codec.read(codec.encode(heads[..., i, :]), None) for i, codec in enumerate(codecs)]
            return torch.cat(parts, dim=-1).to(values)

        attention = model.base_model.layers[plan.index].self_attn
        hooks.append(attention.v_proj.register_forward_hook(replaced))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
