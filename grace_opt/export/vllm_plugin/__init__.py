"""The plug-in of vLLM: models whose attention runs a cache plan (entry point ``vllm.general_plugins``).

`pages` and `attend` need torch alone; the other modules import vLLM, and only vLLM imports them.
"""

from __future__ import annotations

#: type of a model -> the architecture that an exported folder's configuration names, and the class in
#: `grace_opt.export.vllm_plugin.models` that runs it
MODELS = {
    "llama": ("GraceOptLlamaForCausalLM", "CompressedLlama"),
    "mistral": ("GraceOptMistralForCausalLM", "CompressedMistral"),
    "qwen2": ("GraceOptQwen2ForCausalLM", "CompressedQwen2"),
    "qwen3": ("GraceOptQwen3ForCausalLM", "CompressedQwen3"),
}


def register() -> None:
    """Tell vLLM which class runs which architecture. vLLM calls it in each of its processes, perhaps more than once."""
    from vllm import ModelRegistry

    for architecture, name in MODELS.values():
        ModelRegistry.register_model(architecture, f"{__name__}.models:{name}")
