"""grace-opt calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.options import ModelArgument, ModelOptions, Talk, option
from grace_opt.cli.output import print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain


def calibrate(
    ctx: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Graph bundle to write (.safetensors).")],
    *,
    text: Annotated[
        str | None,
        option("--text", help="UTF-8 text file, or - for standard input; Python's own documentation if left out."),
    ] = None,
    tokens: Annotated[int, option("--tokens", help="Tokens of text to run.")] = 4096,
    window: Annotated[
        int | None, option("--window", help="Tokens of one forward pass; 1024, or fewer where tokens or context are.")
    ] = None,
    observation_window: Annotated[
        int, option("--observation-window", help="Last queries of a window that count.")
    ] = 32,
    recent_window: Annotated[int, option("--recent-window", help="Last keys of a window, whole in the cache.")] = 32,
    sinks: Annotated[int, option("--sinks", help="First keys of a window, whole in the cache.")] = 4,
    objective: Annotated[
        str, option("--objective", help="What graphs of keys measure: logit, centered or attention.")
    ] = "attention",
    value_objective: Annotated[
        str | None,
        option("--value-objective", help="Also make graphs of values: norm, read or output; none if left out."),
    ] = None,
    rope_pairs: Annotated[
        bool, option("--rope-pairs/--no-rope-pairs", help="Tie the two key channels of each RoPE pair, for exports.")
    ] = False,
    protection_multiple: Annotated[
        float, option("--protection-multiple", help="Salient: key norm above mean + this many standard deviations.")
    ] = 1.0,
    protection_at_least: Annotated[
        float, option("--protection-at-least", help="Protect at least this fraction (a).")
    ] = 0.05,
    protection_at_most: Annotated[
        float, option("--protection-at-most", help="Protect at most this fraction (b).")
    ] = 0.20,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """Run a model over text and write the channel graph of every layer and KV head."""
    explain(ctx, talk.verbose)
    from grace_opt.files import check_writable
    from grace_opt.graphs import Protection, save_bundle
    from grace_opt.graphs.calibrate import Calibration
    from grace_opt.graphs.calibrate import calibrate as run
    from grace_opt.models.texts import DEFAULT_TEXT, read_pieces

    options = Calibration(
        tokens=tokens,
        window=window,
        observation_window=observation_window,
        recent_window=recent_window,
        sinks=sinks,
        protection=Protection(protection_multiple, protection_at_least, protection_at_most),
        objective=objective,
        value_objective=value_objective,
        rope_pairs=rope_pairs,
    )
    check_writable(output)
    loaded, tokenizer = loading.load(model, talk.quiet)
    with progress(talk.quiet) as show:
        show("calibrate, tokens", 0, tokens)
        bundle = run(
            loaded,
            tokenizer,
            read_pieces(text),
            options,
            model_name=model,
            text_name=text or DEFAULT_TEXT,
            progress=lambda done, total: show("calibrate, tokens", done, total),
        )
    save_bundle(bundle, output)
    done = int(bundle.metadata["tokens"])
    if done + int(bundle.metadata["window"]) <= tokens:
        talk.say(f"the text gave {done} tokens in whole windows, of the {tokens} asked for")
    counts = {key: int(value) if value.isdigit() else value for key, value in bundle.metadata.items()}
    record = {"bundle": str(output), "heads": len(bundle.heads), **counts}
    print_records([record], talk.format, ["bundle", "model", "heads", "head_dim", "tokens", "text"])
