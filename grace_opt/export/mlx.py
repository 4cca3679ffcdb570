"""``mlx``: the folded model of the target ``hf`` as a folder that MLX-LM loads.

MLX-LM's Llama has one width for keys and values, its MiMo-V2-Flash two. That has no biases, reads fields of its own
in place of transformers' (RoPE's among them: without ``rope_theta`` it would turn by other angles without a word), ties
no weights, and must have a layer with a sliding window: the first has one of the whole context. transformers loads the
same folder, since each of the two reads past the other's fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.export.card import card
from grace_opt.export.checkpoint import save_checkpoint
from grace_opt.export.hf import Unbiased, as_replaced
from grace_opt.export.process import answered, installed
from grace_opt.export.target import Checked, Record, Source
from grace_opt.files import write_text
from grace_opt.models.config import text_config

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask

USE = """
from mlx_lm import generate, load

model, tokenizer = load("FOLDER OR REPOSITORY")
print(generate(model, tokenizer, "Once upon a time", max_tokens=16))
"""


class MLX(Unbiased):
    """A stock model with narrower values, in MLX-LM."""

    name = "mlx"
    expresses = "as hf, for Llama and Mistral without biases or scaled RoPE: values alone, no read-outs; in MLX-LM"
    runtime = "mlx-lm"
    tested = ("0.32.2",)
    program = "MLX-LM"

    def supports(self, mask: KVMask, config: Any) -> bool | str:
        if text_config(config).num_hidden_layers < 2:
            return "needs a layer besides that with a sliding window, so two of them; use the target hf"
        return super().supports(mask, config)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        import torch

        model = self.folded(source)
        if model.config.tie_word_embeddings:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
        save_checkpoint(source, model, folder, **_fields(model.config))
        what = (
            f"{source.name} with values of fewer channels, folded into its projections, for MLX-LM. It calls itself "
            "MiMo-V2-Flash, which has a width of values of its own there. No token stays whole."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=["mlx"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Beside the model itself with each value replaced by what it is read as."""
        runtime = installed("mlx-lm")
        asked = {"folder": str(folder.resolve()), "prompt": ids, "new_tokens": new_tokens}
        told = answered("grace_opt.export.mlx_decode", asked, self.program)
        return as_replaced(source, ids, runtime, told["tokens"], told["log_probabilities"])


def _fields(config: Any) -> dict[str, Any]:
    """What MLX-LM reads of a MiMo-V2-Flash by names of its own; experts, which no layer has, by their number 0."""
    layers, theta = config.num_hidden_layers, config.rope_parameters["full_attention"]["rope_theta"]
    return {
        "hybrid_layer_pattern": [int(index == 0) for index in range(layers)],
        "sliding_window_size": config.max_position_embeddings,
        "moe_layer_freq": [0] * layers,
        "layernorm_epsilon": config.rms_norm_eps,
        "rope_theta": theta,
        "swa_rope_theta": theta,
        "partial_rotary_factor": 1.0,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": config.num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "add_swa_attention_sink_bias": False,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }
