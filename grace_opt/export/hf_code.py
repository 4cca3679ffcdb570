"""``hf-code``: a checkpoint with code of its own, whose ``generate`` runs on our cache without being asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_opt.errors import InputError
from grace_opt.export.card import card
from grace_opt.export.checkpoint import save_checkpoint
from grace_opt.export.hf_generate import decoded
from grace_opt.export.target import Checked, Record, Source, Target
from grace_opt.files import write_text
from grace_opt.versions import distribution_version

MODULE, CLASS = "modeling_grace_opt", "GraceOptForCausalLM"

CODE = '''\
"""{base} whose generate holds keys and values in a compressed cache. Written by grace-opt {version}."""

from pathlib import Path

import grace_opt
import grace_opt.runtime
from transformers import {base}
from transformers.utils import cached_file

_OF_HUBS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class {name}({base}):
    """Loaded by AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True); without it, a plain {base}."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *arguments, **options):
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        where = {{name: options[name] for name in _OF_HUBS if name in options}}
        cached_file(pretrained_model_name_or_path, "kv_mask.safetensors", **where)
        mask = cached_file(pretrained_model_name_or_path, "kv_mask.json", **where)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.kv_mask = grace_opt.load_mask(Path(mask).parent)
        return loaded

    def compressed_cache(self, **options):
        """A new cache, as generate makes it; ``options`` are those of grace_opt.runtime.cache."""
        return grace_opt.runtime.cache(self.kv_mask, self, **options)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *arguments, **options):
        asked = generation_config.cache_implementation is not None or model_kwargs.get("past_key_values") is not None
        if not asked and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.compressed_cache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments, **options)
'''

USE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER OR REPOSITORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER OR REPOSITORY")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0]))
"""


class HFCode(Target):
    """The model's weights with a class that makes our cache for each `generate`."""

    name = "hf-code"
    expresses = "every mask that grace_opt.runtime runs, in a checkpoint of its own"
    runtime = "transformers"
    tested = ("5.23.0",)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        import transformers

        model = source.model
        base = type(model).__name__
        if getattr(transformers, base, None) is not type(model):
            raise InputError(
                f"the class of {source.name} ({base}) is none of transformers' own, so it cannot be built upon; use "
                "the target hf-generate"
            )
        auto = {"AutoModelForCausalLM": f"{MODULE}.{CLASS}"}
        save_checkpoint(source, model, folder, architectures=[CLASS], auto_map=auto)
        code = CODE.format(base=base, name=CLASS, version=distribution_version("grace-opt"))
        write_text(folder / f"{MODULE}.py", code)
        write_text(folder / "requirements.txt", f"grace-opt>={distribution_version('grace-opt')}\n")
        what = (
            f"{source.name} with a class whose `generate` holds the keys and values of old tokens in fewer bytes. It "
            "needs the package grace-opt; without `trust_remote_code` it loads as the model that it was."
        )
        write_text(folder / "README.md", card(source, measured, what=what, use=USE, tags=["custom_code"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        from transformers import AutoModelForCausalLM

        from grace_opt.models.inputs import input_device

        loaded: Any = AutoModelForCausalLM
        model = loaded.from_pretrained(folder, trust_remote_code=True, dtype=source.model.dtype)
        return decoded(source, model.to(input_device(source.model)).eval(), ids, new_tokens)
