"""``hf-generate``: a folder, or repository of a hub, whose ``custom_generate`` decodes on our cache.

transformers copies the code that it runs into a cache of its own, by the hash of what it imports beside it, and does
not say where it was. So the mask's two files are in a module beside ``generate.py``, and in the folder for whoever
reads masks.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.compression.mask_file import JSON_NAME, TENSORS_NAME, save_mask
from grace_opt.export.card import card
from grace_opt.export.target import Checked, Record, Source, Target, compared
from grace_opt.files import write_text
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from grace_opt.compression.mask import KVMask

CODE = '''\
"""Decode with a compressed key/value cache: model.generate(..., custom_generate=THIS, trust_remote_code=True).

Written by grace-opt {version}. All arguments of generate keep their meaning.
"""

import base64
import functools
import tempfile
from pathlib import Path

import grace_opt
import grace_opt.runtime

from .kv_mask import FILES


@functools.cache
def mask():
    """What becomes of each token in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in FILES.items():
            Path(folder, name).write_bytes(base64.b64decode(content))
        return grace_opt.load_mask(folder)


def generate(model, **arguments):
    """As model.generate, on a compressed cache unless ``past_key_values`` continues one."""
    past = arguments.pop("past_key_values", None)
    if past is None:
        past = grace_opt.runtime.cache(mask(), model)
    elif not isinstance(past, grace_opt.runtime.PrunedCache):
        raise ValueError("past_key_values is no compressed cache; leave it out, or give one that came from here")
    return model.generate(**arguments, past_key_values=past)
'''

USE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, custom_generate="FOLDER OR REPOSITORY", trust_remote_code=True)[0]))
"""


class HFGenerate(Target):
    """Any mask that our cache runs, on the unmodified model of transformers."""

    name = "hf-generate"
    expresses = "every mask that grace_opt.runtime runs; window, sinks, read-outs and integers included"
    runtime = "transformers"
    tested = ("5.23.0",)

    def write(self, source: Source, folder: Path, measured: Record) -> None:
        code = folder / "custom_generate"
        write_text(code / "generate.py", CODE.format(version=distribution_version("grace-opt")))
        write_text(code / "kv_mask.py", _module(source.mask))
        write_text(code / "requirements.txt", f"grace-opt>={distribution_version('grace-opt')}\n")
        what = (
            "Code for `generate` of transformers that holds the keys and values of old tokens in fewer bytes. It needs "
            "the package grace-opt, and the weights of the model itself."
        )
        use = USE.format(name=repr(source.name))
        write_text(folder / "README.md", card(source, measured, what=what, use=use, tags=["custom_generate"]))

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        return decoded(source, source.model, ids, new_tokens, custom_generate=str(folder), trust_remote_code=True)


def decoded(source: Source, model: Any, ids: list[int], new_tokens: int, **options: Any) -> Checked:
    """What a model's ``generate`` decodes greedily after a prompt, with these options, beside our cache."""
    import torch

    from grace_opt.models.inputs import input_device

    prompt = torch.tensor([ids], device=input_device(source.model))
    with torch.inference_mode():
        run = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    told = torch.cat(run.logits).float().log_softmax(-1)
    name = f"transformers {distribution_version('transformers')}"
    return compared(source, ids, name, run.sequences[0, len(ids) :].tolist(), told)


def _module(mask: KVMask) -> str:
    """Python that holds the two files of a mask in base64."""
    with tempfile.TemporaryDirectory() as folder:
        save_mask(mask, folder)
        held = {
            name: base64.encodebytes(Path(folder, name).read_bytes()).decode() for name in (JSON_NAME, TENSORS_NAME)
        }
    entries = "".join(f'    "{name}": """\n{text}""",\n' for name, text in held.items())
    return f'"""The files of the mask, in base64."""\n\nFILES = {{\n{entries}}}\n'
