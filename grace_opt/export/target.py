"""What an export target does: it says what it can run, writes that for a runtime, and compares the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grace_opt.compression.plugins import Table
from grace_opt.errors import InputError
from grace_opt.export.abilities import Abilities, Needs, model_refusals, refusals

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grace_opt.compression.mask import KVMask
    from grace_opt.evaluate.documents import Passages

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported.

    Attributes:
        mask: of the model.
        model: in evaluation mode; a target changes nothing about it.
        tokenizer: the model's.
        name: of the model, as the user gave it.
        passages: texts to measure on.
    """

    mask: KVMask
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    passages: Passages


class Target(ABC):
    """A runtime that a mask is translated for.

    A subclass is a class without state in a module of its own, which imports the runtime where it is used, and not
    before: `grace-opt targets` names them all, wherever it runs.

    Attributes:
        name: in `TARGETS` and on the command line.
        expresses: what it can run, in a sentence.
        runtime: the distribution that runs it, as pip calls it.
        tested: releases of that distribution that its tests run.
        can: what it runs of a mask, in a form that `supports`, `evaluate` and `solve` read.
    """

    name: ClassVar[str]
    expresses: ClassVar[str]
    runtime: ClassVar[str]
    tested: ClassVar[tuple[str, ...]] = ()
    can: ClassVar[Abilities] = Abilities()

    def supports(self, mask: KVMask, config: Any) -> bool | str:
        """True, or what it cannot run and what to solve instead, before any work.

        A str is the end of a sentence that begins with "the target NAME": "cannot run ...; solve with ...". This looks
        at what ``can`` says; a target adds what that has no words for.
        """
        from grace_opt.models.config import text_config

        said = [*model_refusals(self.can, text_config(config)), *refusals(self.can, Needs.of_mask(mask))]
        return said[0] if said else True

    @abstractmethod
    def write(self, source: Source, folder: Path, measured: Record) -> None:
        """Write what the runtime reads into an empty folder; only for what `supports` takes.

        The folder gets its final name when all of it is there. ``measured`` is what `measure` said, for a model card.
        Raises InputError for what only the model's weights show.
        """

    def measure(self, source: Source) -> Record:
        """What it costs in quality: a record of `grace_opt.evaluate` on the passages, with its ``kl`` in nats a token.

        That of our own cache under the mask's plan, prompts and generated tokens treated as ``can`` says; a target that
        runs something else measures that.
        """
        from grace_opt.evaluate.kl import evaluate
        from grace_opt.evaluate.trial import mask_trial

        trial = mask_trial(source.mask.model, self.can.as_run(source.mask))
        return evaluate(source.model, source.passages, [trial])[0]

    @abstractmethod
    def check(self, source: Source, folder: Path, ids: list[int], new_tokens: int) -> Checked:
        """Decode ``new_tokens`` greedily after the prompt ``ids`` with what was written, in its runtime (`compared`).

        Raises InputError if the runtime is not installed.
        """


def require_able(name: str, needs: Needs) -> None:
    """Raise InputError if a target cannot do what a mask that is to be solved for needs, with its sentence."""
    for sentence in refusals(TARGETS[name].can, needs):
        raise InputError(f"the target {name} {sentence}")


@dataclass(frozen=True)
class Checked:
    """What came of running an export beside our own cache under the mask's plan.

    Attributes:
        runtime: and its version.
        tokens: that it decoded.
        behind: by how many nats the worst of them is less likely than the likeliest, as our cache has it after the same
            tokens; 0 where it would have decoded the same.
        largest: difference of a log-probability between the two, in nats; None where the runtime tells none.
    """

    runtime: str
    tokens: list[int]
    behind: float
    largest: float | None


def compared(
    source: Source,
    ids: list[int],
    runtime: str,
    tokens: list[int],
    told: Tensor | None = None,
    *,
    prompt: int | None = None,
    narrow: bool = False,
) -> Checked:
    """Tokens that a runtime decoded after a prompt beside our cache, which is fed the same, the prompt ``narrow`` too.

    ``told``: log-probabilities before each token, [n] of these tokens or [n, vocabulary]; None: not known. A tie that
    rounding decides otherwise is seen as one, and what follows it is still compared. ``prompt``: of ``ids``, how many
    our cache reads as a prompt, and not token by token; all if left out.
    """
    import torch

    from grace_opt.models.inputs import input_device
    from grace_opt.runtime.generate import forced

    device = input_device(source.model)
    count = len(ids) if prompt is None else prompt
    fed = torch.tensor([*ids[count:], *tokens], device=device)
    whole = torch.tensor([ids[:count]], device=device)
    run, _ = forced(source.model, whole, fed, source.mask.plan, narrow=narrow)
    ours, decoded = run.logits.log_softmax(-1)[len(ids) - count :], fed[len(ids) - count :]
    own = ours.gather(1, decoded[:, None])[:, 0]
    behind = float((ours.amax(-1) - own).max())
    largest = None
    if told is not None:
        largest = float(((own if told.dim() == 1 else ours) - told.to(ours)).abs().max())
    return Checked(runtime, tokens, behind, largest)


#: the targets by name; `TARGETS.register` adds one, as does the entry-point group ``grace_opt.targets``
TARGETS: Table[type[Target]] = Table(
    "target",
    "grace_opt.targets",
    {
        "gguf": "grace_opt.export.gguf:GGUF",
        "hf": "grace_opt.export.hf:HF",
        "hf-code": "grace_opt.export.hf_code:HFCode",
        "hf-generate": "grace_opt.export.hf_generate:HFGenerate",
        "kv-store": "grace_opt.export.kv_store:KVStoreTarget",
        "kvpress": "grace_opt.export.kvpress:KVPress",
        "mlx": "grace_opt.export.mlx:MLX",
        "onnx": "grace_opt.export.onnx:ONNX",
        "vllm": "grace_opt.export.vllm:VLLM",
    },
)
