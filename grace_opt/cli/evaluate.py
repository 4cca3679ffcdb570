"""grace-opt evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grace_opt.cli.config import named_options
from grace_opt.cli.options import ModelArgument, ModelOptions, SeedOption, Talk, option
from grace_opt.cli.output import Format, print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain, write_run
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.evaluate.run import Trial


def evaluate(
    ctx: typer.Context,
    model: ModelArgument,
    *,
    method: Annotated[
        list[str] | None, option("--method", help="Method name; grace-opt methods lists them; repeatable.")
    ] = None,
    ratio: Annotated[
        list[float] | None, option("--ratio", help="Fraction of the key channels to prune, in [0, 1); repeatable.")
    ] = None,
    value_ratio: Annotated[
        float | None, option("--value-ratio", help="Fraction of the value channels to prune; 0 if left out.")
    ] = None,
    budget_bytes: Annotated[
        list[float] | None,
        option("--budget-bytes", help="Bytes of keys and values an old token may take, in all layers; repeatable."),
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option("--mask", help="Mask folder, from grace-opt solve; repeatable.")
    ] = None,
    text: Annotated[
        str | None,
        option(
            "--text", help='Folder of .txt, .jsonl with "text", or one text file; Python\'s documentation if left out.'
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        option("--dataset", help="longbench:TASK or ruler:LENGTH, from the Hugging Face hub or from a copy at --text."),
    ] = None,
    method_option: Annotated[
        list[str] | None, option("--method-option", help="NAME.OPTION=VALUE, a field of method NAME; repeatable.")
    ] = None,
    prefix: Annotated[
        int | None, option("--prefix", help="Tokens of each prompt; 2048, or fewer where the context is shorter.")
    ] = None,
    scored: Annotated[int, option("--scored", help="Tokens after each prompt that are scored.")] = 256,
    documents: Annotated[int, option("--documents", help="Documents at the most.")] = 12,
    prune_generated: Annotated[
        bool | None,
        option(
            "--prune-generated/--keep-generated",
            help="Prune scored tokens as they leave the recent window, or keep them whole as ThinK and GRACE do; "
            "as the method or mask says if left out.",
        ),
    ] = None,
    needle_length: Annotated[
        list[int] | None, option("--needle-length", help="Tokens of a needle prompt; repeatable; none if left out.")
    ] = None,
    needle_depth: Annotated[
        list[float] | None, option("--needle-depth", help="Depth of the needle; repeatable; 0.1, 0.5 and 0.9.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for records.jsonl, run.json and figures.")
    ] = None,
    seed: SeedOption = 0,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Measure what methods cost in quality: KL and NLL against the uncompressed cache, needles, bytes."""
    sources = explain(ctx, talk.verbose)
    from grace_opt.evaluate.documents import check_counts, load_dataset_documents, read_documents
    from grace_opt.evaluate.run import evaluate as run
    from grace_opt.evaluate.run import prompts
    from grace_opt.evaluate.tasks.needle import check_needles
    from grace_opt.files import check_writable
    from grace_opt.reports.tables import quality_row
    from grace_opt.versions import versions_of

    if needle_depth and not needle_length:
        raise InputError("--needle-depth says where needles are; give --needle-length too")
    planned = _planned(method or [], method_option or [], ratio or [], value_ratio, budget_bytes or [], mask or [])
    lengths, depths = needle_length or [], needle_depth or [0.1, 0.5, 0.9]
    check_counts(prefix, scored, documents)
    check_needles(lengths, depths)
    if output is not None:
        check_writable(output / "records.jsonl")
    name, _, split = (dataset or "").partition(":")
    local = None if text is None else Path(text)
    texts = read_documents(text) if dataset is None else load_dataset_documents(name, split, local)
    loaded, tokenizer = loading.load(model, talk.quiet)
    chosen, needles = prompts(loaded, tokenizer, texts, prefix, scored, documents, lengths, depths, seed)
    with progress(talk.quiet) as show:
        show("evaluate, caches scored")
        records = run(
            loaded,
            tokenizer,
            chosen,
            planned,
            generated=None if prune_generated is None else "prune" if prune_generated else "keep",
            needles=needles,
            seed=seed,
            progress=lambda done, total: show("evaluate, caches scored", done, total),
        )
    records = [{"model": model, **record} for record in records]
    if chosen.too_short:
        talk.say(f"{chosen.too_short} documents have fewer than {chosen.prefix + scored} tokens and were left out")
    if len(chosen.ids) == 1:
        talk.say("one document gives no interval; give more")
    if output is not None:
        from grace_opt.reports.figures import draw

        write_run(output, records, sources, seed, versions_of(("torch", "transformers")))
        figures = draw(records, output)
        talk.say(f"records and {len(figures)} figures written to {output}")
    if talk.format is Format.JSON:
        print_records(records, talk.format)
        return
    print_records([quality_row(record) for record in records], talk.format)


def _planned(
    names: list[str],
    options: list[str],
    ratios: list[float],
    value_ratio: float | None,
    budget_bytes: list[float],
    masks: list[Path],
) -> list[Trial]:
    """What is to be measured: every method at every budget, and the masks."""
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.mask_file import load_mask
    from grace_opt.compression.method import method, require_effect
    from grace_opt.evaluate.run import mask_trial, trials

    overrides = named_options("--method-option", names, options)
    if value_ratio is not None and not ratios:
        raise InputError("--value-ratio goes with --ratio; --budget-bytes shares its bytes between keys and values")
    budgets = [Budget(ratio, value_ratio or 0.0) for ratio in ratios]
    budgets += [Budget(bytes_per_token=most) for most in budget_bytes]
    if names and not budgets:
        raise InputError("a method needs a budget; give --ratio or --budget-bytes")
    if not names and not masks:
        raise InputError("there is nothing to evaluate; give --method with --ratio, or --mask")
    if budgets and not names:
        raise InputError("a mask has its own budget; give --method with --ratio or --budget-bytes, or leave them out")
    methods = {name: method(name, overrides[name]) for name in names}
    for name, made in methods.items():
        if "offline_solver" in overrides[name]:
            raise InputError("the method's option offline_solver is for bundles; solver is the one for prompts")
        require_effect(made, overrides[name], budgets)
    planned = trials(methods, budgets)
    return [*planned, *(mask_trial(str(folder), load_mask(folder)) for folder in masks)]
