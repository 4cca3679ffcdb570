"""A target for tests, and a tiny model with a tokenizer to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grace_opt import KVMask
from grace_opt.errors import InputError
from grace_opt.evaluate.documents import Document
from grace_opt.export.target import Checked, Source, Target, compared
from grace_opt.files import write_text
from grace_opt.runtime.generate import forced
from tests.support.families import tiny_model
from tests.support.generation import random_mask

WORDS = " ".join(f"w{4 + i * 7 % 95}" for i in range(400))
TEXTS = [Document("words", WORDS, cut=True)]
SHORT: dict[str, Any] = {"texts": TEXTS, "length": 40, "scored": 8, "prompts": 1, "kl_limit": float("inf")}


def tiny(family: str = "Llama", **overrides: Any) -> tuple[Any, Any]:
    """A tiny random model and a word-level tokenizer of its vocabulary."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 99)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return tiny_model(family, **overrides), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_bpe(family: str = "Llama", pre: str = "smollm", *, ascii: bool = False, **overrides: Any) -> tuple[Any, Any]:
    """A tiny random model with a byte-level BPE of bytes and a few merges, cut as GPT-2 or SmolLM2 cut.

    ``ascii``: what it decodes is always whole characters.
    """
    signs = [
        sign for sign in sorted(pre_tokenizers.ByteLevel.alphabet()) if not ascii or sign < "\x7f" or sign == "\u0120"
    ]
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *signs])}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u0120", "w"), ("1", "2")]
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
    tokenizer.pre_tokenizer = digits if pre == "smollm" else bytes_of
    tokenizer.decoder = decoders.ByteLevel()
    model = tiny_model(family, **{"vocab_size": len(vocabulary) + 3, **overrides})
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_mask(model: Any, **more: Any) -> KVMask:
    """Half of the channels of keys and values, by static read-outs, beside a window of 8."""
    options = {"kept": 8, "recent_window": 8, "sinks": 2, "readout": "static", "values": 8}
    return random_mask(model, **{**options, **more})


class Plain(Target):
    """Runs masks with a window, and writes a line; what it wrote runs as our cache, or not at all."""

    name = "plain"
    expresses = "masks with a window"
    runtime = "torch"
    fails = False  # in the middle of writing
    differs = False  # from our cache

    def supports(self, mask: KVMask, config: Any) -> bool | str:
        return mask.windows.recent_window > 0 or "needs a recent window; solve with --recent-window 128"

    def write(self, source: Source, folder: Path, measured: Any) -> None:
        write_text(folder / "line.txt", f"{source.name}: {measured['kl']['mean']:.3f}\n")
        if self.fails:
            raise InputError("the disk of this test is full")

    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        run, tokens = forced(source.model, torch.tensor([ids]), new_tokens, source.mask.plan)
        return compared(source, ids, "torch 1", tokens.tolist(), run.logits.log_softmax(-1) + self.differs)
