"""The conformance kit of export targets: what `grace_opt.export` and whoever runs an export rely on.

from grace_opt.testing.exports import check_target
check_target("my-target", mask, model, tokenizer, texts)     # raises AssertionError, in a sentence
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.errors import InputError
from grace_opt.evaluate.documents import Document, passages
from grace_opt.export.run import COARSE, TOLERANCE, export, load_manifest, require_supported
from grace_opt.export.target import TARGETS, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grace_opt.compression.mask import KVMask

CODE_IN_DATA = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".npy", ".joblib")  # what may hold a pickle


def check_target(
    name: str,
    mask: KVMask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Document],
    *,
    length: int = 64,
    scored: int = 16,
    new_tokens: int = 8,
) -> None:
    """Export a mask that the target takes, look at what was written, and run it. Raises AssertionError.

    ``texts`` hold two prompts of ``length`` tokens at least. Needs the runtime.
    """
    assert name in TARGETS, f"target {name!r} is not registered; TARGETS.register it"
    target = TARGETS[name]()
    assert target.name == name, f"the target {name!r} calls itself {target.name!r}"
    assert target.expresses, "a target must say what it runs (expresses)"
    assert target.runtime, "a target must name the distribution that runs it (runtime)"
    answer = target.supports(mask, model.config)
    assert answer is True, f"the kit needs a mask that the target runs; this one {answer}"
    chosen = passages(texts, tokenizer, length, scored, 1)
    source = Source(mask, model, tokenizer, "a/model", chosen)
    before, settings = _weights(model), copy.deepcopy(model.config.to_dict())
    with tempfile.TemporaryDirectory() as work:
        options: dict[str, Any] = {"texts": texts, "length": length, "scored": scored, "prompts": 1}
        first, again, moved = (Path(work, each) for each in ("first", "again", "moved"))
        for folder in (first, again):
            export(mask, model, tokenizer, name, folder, name="a/model", kl_limit=math.inf, **options)
        _check_files(first, again, work)
        first.rename(moved)
        load_manifest(moved, name)
        checked = target.check(source, moved, chosen.ids[0][:length], new_tokens)
    assert len(checked.tokens) == new_tokens, f"{len(checked.tokens)} tokens were decoded, of {new_tokens}"
    allowed = TOLERANCE if model.dtype.itemsize == 4 else COARSE
    off = max(checked.behind, checked.largest or 0.0)
    assert off <= allowed, f"log-probabilities are off by {off:.3g} from those of our cache"
    assert _weights(model) == before, "a target must not change the model's weights"
    assert model.config.to_dict() == settings, "a target must not change the model's configuration"


def check_refusal(name: str, mask: KVMask, config: Any) -> str:
    """The sentence with which a target refuses a mask. Raises AssertionError if it takes it, or says no cure."""
    try:
        require_supported(TARGETS[name](), mask, config)
    except InputError as error:
        sentence = str(error)
        assert ";" in sentence, f"a refusal must say what to do instead, after a semicolon: {sentence!r}"
        assert len(sentence) < 400, f"a refusal must be one sentence, not {len(sentence)} characters"
        return sentence
    raise AssertionError(f"the target {name} takes this mask")


def _check_files(one: Path, other: Path, work: str) -> None:
    files = {folder: _contents(folder) for folder in (one, other)}
    assert files[one] == files[other], "the same mask and model must be written as the same bytes"
    for name, content in files[one].items():
        assert not name.endswith(CODE_IN_DATA), f"{name} may hold a pickle; write safetensors or JSON"
        assert work.encode() not in content, f"{name} names the folder that it was written to"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _weights(model: PreTrainedModel) -> list[float]:
    """Something that changes with any weight."""
    return [float(each.double().square().sum()) for each in model.state_dict().values()]
