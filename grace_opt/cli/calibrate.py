"""grace-opt calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.options import CalibrationOptions, ModelArgument, ModelOptions, Talk
from grace_opt.cli.output import print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain


def calibrate(
    ctx: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Graph bundle to write (.safetensors).")],
    *,
    reading: CalibrationOptions,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Run a model over text and write the channel graph of every layer and KV head."""
    explain(ctx, talk.verbose)
    from grace_opt.files import check_writable
    from grace_opt.graphs import save_bundle
    from grace_opt.graphs.calibrate import calibrate as run
    from grace_opt.models.texts import DEFAULT_TEXT, read_pieces

    options = reading.calibration()
    options.window_for(None)
    check_writable(output)
    loaded, tokenizer = loading.load(model, talk.quiet)
    with progress(talk.quiet) as show:
        show("calibrate, tokens", 0, options.tokens)
        bundle = run(
            loaded,
            tokenizer,
            read_pieces(reading.text),
            options,
            model_name=model,
            text_name=reading.text or DEFAULT_TEXT,
            progress=lambda done, total: show("calibrate, tokens", done, total),
        )
    save_bundle(bundle, output)
    done = int(bundle.metadata["tokens"])
    if done + int(bundle.metadata["window"]) <= options.tokens:
        talk.say(f"the text gave {done} tokens in whole windows, of the {options.tokens} asked for")
    counts = {key: int(value) if value.isdigit() else value for key, value in bundle.metadata.items()}
    record = {"bundle": str(output), "heads": len(bundle.heads), **counts}
    print_records([record], talk.format, ["bundle", "model", "heads", "head_dim", "tokens", "text"])
