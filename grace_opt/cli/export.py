"""grace-opt export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.options import ModelArgument, ModelOptions, OutputFolder, Talk, option
from grace_opt.cli.output import Format, print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain


def export(
    ctx: typer.Context,
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Mask folder, from grace-opt solve.")],
    model: ModelArgument,
    *,
    to: Annotated[str, typer.Option("--to", help="Target; grace-opt targets lists them.")],
    output: OutputFolder,
    text: Annotated[
        str | None,
        option(
            "--text",
            help='Measure on this: a folder of .txt, .jsonl with "text", or one text file; prose of Python\'s library '
            "if left out.",
        ),
    ] = None,
    length: Annotated[
        int, option("--length", help="Tokens of each prompt that is measured; fewer where the context is shorter.")
    ] = 1024,
    scored: Annotated[int, option("--scored", help="Tokens after each prompt that are compared.")] = 128,
    prompts: Annotated[int, option("--prompts", help="Prompts that are measured at the most.")] = 2,
    kl_limit: Annotated[
        float, option("--kl-limit", help="Refuse to write what loses more nats a token; inf refuses nothing.")
    ] = 0.1,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Run what was written in its runtime, and compare with our cache."),
    ] = False,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Write a mask in the form that an inference runtime reads."""
    explain(ctx, talk.verbose)
    from grace_opt.compression.mask_file import load_mask
    from grace_opt.evaluate.documents import check_counts, read_documents
    from grace_opt.export.run import export as run
    from grace_opt.export.target import TARGETS
    from grace_opt.files import check_new

    check_counts(length, scored, prompts)
    TARGETS[to], check_new(output)  # before any work
    given = load_mask(mask)
    texts = None if text is None else read_documents(text)
    loaded, tokenizer = loading.load(model, talk.quiet)
    with progress(talk.quiet) as show:
        written = run(
            given,
            loaded,
            tokenizer,
            to,
            output,
            name=model,
            texts=texts,
            length=length,
            scored=scored,
            prompts=prompts,
            kl_limit=kl_limit,
            check=check,
            progress=lambda step: show(f"export, {step}"),
        )
    measured, checked = written.manifest["measured"], written.checked
    record = {
        "target": to,
        "model": model,
        "folder": str(output),
        "kl": measured["kl"]["mean"],
        "bytes_per_token": measured["bytes_per_token"],
        "of_full": measured["bytes_per_token"] / measured["full_bytes_per_token"],
        "checked": None if checked is None else checked.runtime,
        "off_by": None if checked is None else max(checked.behind, checked.largest or 0.0),
    }
    if talk.format is Format.JSON:
        print_records([record], talk.format, manifest=written.manifest)
        return
    print_records([record], talk.format)
