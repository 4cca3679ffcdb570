"""grace-opt evaluate."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grace_opt.cli.budgets import OF_RATIOS, BudgetSharesOption
from grace_opt.cli.config import named_options
from grace_opt.cli.options import ModelArgument, ModelOptions, SeedOption, Talk, option
from grace_opt.cli.output import Format, print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import command_line, explain, write_run
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.evaluate.trial import Generated, Trial


def evaluate(
    ctx: typer.Context,
    model: ModelArgument,
    *,
    method: Annotated[
        list[str] | None,
        option("--method", help="Method name; grace-opt methods lists them; +int4 adds integers; repeatable."),
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
    budget_share: BudgetSharesOption = None,
    mask: Annotated[
        list[Path] | None, typer.Option("--mask", help="Mask folder, from grace-opt solve; repeatable.")
    ] = None,
    target: Annotated[
        str | None,
        option("--target", help="Measure masks as this runs them; grace-opt targets lists what there is."),
    ] = None,
    task: Annotated[
        list[str] | None,
        option("--task", help="kl, or a task: ruler, ruler/vt, longeval, needle, ...; repeatable; kl if left out."),
    ] = None,
    length: Annotated[
        list[int] | None,
        option("--length", help="Tokens of each prompt; repeatable; 2048, or fewer where the context is shorter."),
    ] = None,
    prompts: Annotated[
        int, option("--prompts", help="Prompts of each task and length; of kl, documents at the most.")
    ] = 12,
    scored: Annotated[int, option("--scored", help="Tokens after each document's prompt that kl scores.")] = 256,
    chat: Annotated[
        bool | None,
        option("--chat/--no-chat", help="Ask tasks in the tokenizer's chat template; if it has one, if left out."),
    ] = None,
    text: Annotated[
        str | None,
        option(
            "--text",
            help='For kl: folder of .txt, .jsonl with "text", or one text file; Python\'s documentation if left out. '
            "For longbench and RULER's questions: a local copy.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        option(
            "--dataset", help="For kl: longbench:TASK or ruler:LENGTH, from the Hugging Face hub or a copy at --text."
        ),
    ] = None,
    method_option: Annotated[
        list[str] | None, option("--method-option", help="NAME.OPTION=VALUE, a field of method NAME; repeatable.")
    ] = None,
    prune_generated: Annotated[
        bool | None,
        option(
            "--prune-generated/--keep-generated",
            help="Prune tokens after the prompt as they leave the recent window, or keep them whole as ThinK and GRACE "
            "do; as the method or mask says if left out.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for records, figures and a report; a killed run goes on there."),
    ] = None,
    seed: SeedOption = 0,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Measure what methods cost in quality, at equal bytes: KL against the uncompressed cache, and tasks' scores."""
    sources = explain(ctx, talk.verbose)
    from grace_opt.evaluate.measurements import Measurements
    from grace_opt.evaluate.run import Plan, run
    from grace_opt.export.run import as_run
    from grace_opt.files import check_writable
    from grace_opt.records import Measurement
    from grace_opt.records_file import RecordsFile
    from grace_opt.reports import leaderboard
    from grace_opt.reports.tables import quality_row, score_row
    from grace_opt.versions import versions_of

    generated: Generated | None = None if prune_generated is None else "prune" if prune_generated else "keep"
    planned = _planned(
        method or [],
        method_option or [],
        _budgets(ratio or [], value_ratio, budget_bytes or [], budget_share or []),
        mask or [],
        generated,
    )
    plan = Plan(tuple(task or ["kl"]), tuple(length or ()), prompts, scored, chat, text, dataset, seed)
    plan.check()
    _require_target(target, method or [], generated)
    if output is not None:
        check_writable(output / "measurements.jsonl")
    loaded, tokenizer = loading.load(model, talk.quiet)
    if target is not None:
        planned = [as_run(target, trial, loaded.config) for trial in planned]
    place = output / "measurements.jsonl" if output is not None else None
    with (
        nullcontext() if place is None else RecordsFile(place, Measurement, talk.say) as file,
        progress(talk.quiet) as show,
    ):
        keep: dict[str, Any] = {}
        if output is not None:
            keep["keep"] = partial(leaderboard.write, folder=output / "kvpress", model=model, seed=seed)
        records = run(loaded, tokenizer, planned, plan, Measurements(file), show, talk.say, **keep)
    records = [{"model": model, **record} for record in records]
    kl = [record for record in records if record["task"] == "kl"]
    answered = [record for record in records if record["task"] != "kl"]
    if output is not None:
        from grace_opt.reports import evaluation

        versions = versions_of(("torch", "transformers"))
        write_run(output, records, sources, seed, versions)
        about = {"command": shlex.join(command_line()), "seed": seed, **versions}
        figures = evaluation.write(records, output, about)
        talk.say(f"records, {len(figures)} figures and report.html written to {output}")
    if talk.format is Format.JSON:
        print_records(records, talk.format)
        return
    for rows in ([quality_row(record) for record in kl], [score_row(record) for record in answered]):
        if rows:
            print_records(rows, talk.format)


def _require_target(target: str | None, methods: list[str], generated: Generated | None) -> None:
    """Refuse a target that there is not, and what says otherwise than it."""
    if target is None:
        return
    from grace_opt.export.target import TARGETS

    does = TARGETS[target].can.generated
    if methods:
        raise InputError("--target runs masks, not methods; make masks with grace-opt solve, and give them with --mask")
    if generated is not None and does is not None:
        flag = "--keep-generated" if does == "keep" else "--prune-generated"
        raise InputError(f"what {target} does with generated tokens is as with {flag}; leave that option out")


def _budgets(
    ratios: list[float], value_ratio: float | None, budget_bytes: list[float], shares: list[float]
) -> list[Any]:
    from grace_opt.compression.budget import Budget

    if value_ratio is not None and not ratios:
        raise InputError(OF_RATIOS)
    budgets = [Budget(ratio, value_ratio or 0.0) for ratio in ratios]
    budgets += [Budget(bytes_per_token=most) for most in budget_bytes]
    return [*budgets, *(Budget(share=share) for share in shares)]


def _planned(
    names: list[str], options: list[str], budgets: list[Any], masks: list[Path], generated: Generated | None
) -> list[Trial]:
    """What is to be measured: every method at every budget, and the masks."""
    from grace_opt.compression.mask_file import load_mask
    from grace_opt.compression.method import method, require_effect
    from grace_opt.evaluate.trial import mask_trial, trials

    overrides = named_options("--method-option", names, options)
    if names and not budgets:
        raise InputError("a method needs a budget; give --ratio, --budget-bytes or --budget-share")
    if not names and not masks:
        raise InputError("there is nothing to evaluate; give --method with a budget, or --mask")
    if budgets and not names:
        raise InputError("a mask has its own budget; give --method with --ratio or --budget-bytes, or leave them out")
    methods = {name: method(name, overrides[name]) for name in names}
    for name, made in methods.items():
        if "offline_solver" in overrides[name]:
            raise InputError("the method's option offline_solver is for bundles; solver is the one for prompts")
        require_effect(made, overrides[name], budgets)
    planned = trials(methods, budgets, generated)
    return [*planned, *(mask_trial(str(folder), load_mask(folder), generated) for folder in masks)]
