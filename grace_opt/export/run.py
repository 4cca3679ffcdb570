"""Write a mask for a runtime: check, measure, write, run what was written. Nothing appears that is not whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_opt.compression.mask import KVMask
from grace_opt.compression.mask_file import JSON_NAME, TENSORS_NAME, load_mask, save_mask
from grace_opt.errors import InputError, shown
from grace_opt.evaluate.documents import Document, passages
from grace_opt.export.target import TARGETS, Checked, Record, Source, Target
from grace_opt.files import check_new, file_sha256, new_folder, write_json
from grace_opt.models.config import config_sha256, context_of
from grace_opt.models.texts import prose
from grace_opt.reading import read_json
from grace_opt.versions import distribution_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grace_opt.evaluate.trial import Trial

FORMAT, VERSION = "grace-opt-export", 1
MANIFEST = "grace_opt_export.json"
KL_LIMIT = 0.1  #: nats a token
CHECK_TOKENS = 16  #: that a check decodes
TOLERANCE, COARSE = 1e-3, 0.1  #: of log-probabilities in a check: in float32, and in 16 bits


@dataclass(frozen=True)
class Exported:
    """A folder that was written, what it is measured to cost, and what came of running it, if that was asked for."""

    folder: Path
    manifest: Record
    checked: Checked | None


def export(
    mask: KVMask | str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    output: str | Path,
    *,
    name: str | None = None,
    texts: Sequence[Document] | None = None,
    length: int = 1024,
    scored: int = 128,
    prompts: int = 2,
    kl_limit: float = KL_LIMIT,
    check: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a mask for a runtime into a new folder.

    First the KL to the uncompressed model is measured on a text, and a target whose loss is above ``kl_limit`` is
    refused. The folder holds what the runtime reads, the mask, and ``grace_opt_export.json`` with the model, the
    measurement, versions and a sha256 for each file.

    Args:
        mask: a folder or a `KVMask`, of this model.
        target: its name in `grace_opt.export.target.TARGETS`.
        output: the folder; it must not exist.
        name: of the model, in what is written; as the model calls itself if left out.
        texts: to measure on; prose that every CPython carries if left out.
        length, scored, prompts: tokens of a prompt, tokens after it that are compared, and prompts at most. A prompt
            is shorter where the model's context is.
        kl_limit: nats a token; infinity never refuses.
        check: run what was written in its runtime, and refuse where its log-probabilities are not those of our cache.

    Raises:
        InputError: for an unknown target, an output that exists, a mask of another model, a plan that the target cannot
            run (with what to solve instead), a measured KL above the limit, and a check that fails.
    """
    runs = TARGETS[target]()
    check_new(output)
    given = mask if isinstance(mask, KVMask) else load_mask(mask)
    called = name or str(model.config.name_or_path)
    given.check_model(model.config, called)
    require_supported(runs, given, model.config)
    if not kl_limit > 0:
        raise InputError(f"the limit of KL must be above 0, got {kl_limit:g}; give infinity to refuse nothing")
    found = [Document("prose", "".join(prose()), cut=True)] if texts is None else list(texts)
    context = context_of(model.config) or length + scored
    chosen = passages(found, tokenizer, min(length, context - scored), scored, prompts)
    source = Source(given, model, tokenizer, called, chosen)
    progress("measure")
    measured = runs.measure(source)
    kl = float(measured["kl"]["mean"])
    if not kl <= kl_limit:
        raise InputError(
            f"this mask costs {kl:.3g} nats a token as {target} runs it (KL on {measured['documents']} texts), more "
            f"than the {kl_limit:g} allowed; solve with a larger budget or a wider window, or raise the limit of KL"
        )
    checked = None
    with new_folder(output) as folder:
        progress("write")
        runs.write(source, folder, measured)
        save_mask(given, folder)
        manifest = _manifest(runs, source, measured)
        if check:
            progress("check")
            checked = _checked(runs, source, folder, chosen.ids[0][: chosen.prefix])
            manifest["checked"] = asdict(checked)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest["files"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
        write_json(folder / MANIFEST, manifest)
    return Exported(Path(output), manifest, checked)


def require_supported(target: Target, mask: KVMask, config: Any) -> None:
    """Raise InputError if a target cannot run a mask, with its sentence."""
    answer = target.supports(mask, config)
    if answer is not True:
        raise InputError(f"the target {target.name} {answer}")


def as_run(target: str, trial: Trial, config: Any) -> Trial:
    """A mask that is evaluated, as a target runs it. Raises InputError if it cannot, with its sentence."""
    assert isinstance(trial.what, KVMask)
    runs = TARGETS[target]()
    require_supported(runs, trial.what, config)
    return replace(trial, what=runs.can.as_run(trial.what))


def load_manifest(folder: str | Path, target: str) -> Record:
    """What `export` wrote beside a mask, its files checked. Raises InputError for another folder, or a changed file."""
    path = Path(folder) / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} was not written by grace-opt export; export again")
    if manifest.get("version") != VERSION or manifest.get("target") != target:
        version, other = (shown(str(manifest.get(name)), 40) for name in ("version", "target"))
        raise InputError(
            f"{path} is of version {version} for {other}, and version {VERSION} for {target} is read here; export "
            "again with this grace-opt"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {JSON_NAME, TENSORS_NAME} <= set(files):
        raise InputError(f"{path} lacks its list of files; export again")
    for name, wanted in files.items():
        held = Path(folder, name)
        if Path(name).is_absolute() or ".." in Path(name).parts or file_sha256(held) != wanted:
            raise InputError(f"{held} is not the file that was exported (sha256 differs); export again")
    return manifest


def _manifest(target: Target, source: Source, measured: Record) -> Record:
    return {
        "format": FORMAT,
        "version": VERSION,
        "target": target.name,
        "model": source.name,
        "config_sha256": config_sha256(source.model.config),
        "runtime": {"name": target.runtime, "tested": list(target.tested)},
        "versions": {each: distribution_version(each) for each in ("grace-opt", "torch", "transformers")},
        "measured": {
            key: measured[key]
            for key in ("kl", "nll", "top1", "bytes_per_token", "full_bytes_per_token", "length", "scored", "documents")
        },
    }


def _checked(target: Target, source: Source, folder: Path, ids: list[int]) -> Checked:
    checked = target.check(source, folder, ids, CHECK_TOKENS)
    allowed = TOLERANCE if source.model.dtype.itemsize == 4 else COARSE
    off = max(checked.behind, checked.largest or 0.0)
    if not off <= allowed:
        raise InputError(
            f"{checked.runtime} decodes this export otherwise than our cache (log-probabilities are off by {off:.3g}, "
            f"of {allowed:g} allowed), so nothing was written; report it with the mask and the model's name"
        )
    return checked
