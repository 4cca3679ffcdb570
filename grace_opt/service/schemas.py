"""Bodies of the API. A field that a record has bears its name; records themselves are in `grace_opt.records`."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from grace_opt.compression.readout import READOUT_SCOPES
from grace_opt.records import SHA256, Record, budget_of
from grace_opt.service.db.tables import State

Digest = Annotated[str, Field(pattern=SHA256, description="sha256, 64 hexadecimal digits")]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]  #: PostgreSQL holds no NUL
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  #: databases hold no more
Short = Annotated[Text, Field(max_length=200)]
Option = Short | Whole | float | bool | None
MethodOption = Option | Annotated[dict[Short, Option], Field(max_length=100)]
Scope = Literal["read", "submit", "admin"]
Sort = Literal["id", "problem", "status", "objective", "gap", "reference_gap", "over_best", "time"]


class Body(BaseModel):
    """Unknown fields are refused, and so is NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SolverChoice(Body):
    """A solver and its options."""

    solver: Text = Field(min_length=1, max_length=100, examples=["branch-and-bound"])
    options: dict[Short, Option] = Field(default_factory=dict, max_length=100, examples=[{}])


class RunLimits(Body):
    """Limits of each head, as in `grace_opt.Limits`."""

    time_limit: float | None = Field(None, ge=0, le=1e6, description="seconds")
    gap_rel: float = Field(1e-6, ge=0, le=1e300)
    gap_abs: float = Field(0.0, ge=0, le=1e300)
    node_limit: int | None = Field(None, ge=0, le=2**53)
    iteration_limit: int | None = Field(None, ge=0, le=2**53)
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int = Field(1, ge=1, le=256)


class RunConfig(Body):
    """What problems are made of the graphs, and what masks of their solutions."""

    protect: bool | None = Field(None, description="keep the bundle's protected channels; as the method says if null")
    readout: Literal["prefill", "static", "none"] = Field(
        "prefill", description="scope of the masks' read-out, if the method has one"
    )
    recent_window: int | None = Field(None, ge=0, lt=2**31, description="of the masks; the graphs' own if null")
    sinks: int | None = Field(None, ge=0, lt=2**31, description="of the masks; the graphs' own if null")


assert set(RunConfig.model_fields["readout"].annotation.__args__) == set(READOUT_SCOPES)  # type: ignore[union-attr]


class RunRequest(Body):
    """Every solver on every head of a bundle at every budget, which a method shares over the heads."""

    bundle: Digest = Field(description="digest of a bundle that the service has")
    solvers: list[SolverChoice] = Field(min_length=1, max_length=32)
    method: Short = Field("grace-opt", description="name of a method: `grace-opt methods`")
    method_options: dict[Short, MethodOption] = Field(
        default_factory=dict,
        max_length=100,
        description="in place of the method's own",
        examples=[{"budget": "uniform"}],
    )
    ratios: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=list, max_length=32, description="fractions of the key channels to prune"
    )
    value_ratio: float | None = Field(
        None, ge=0, lt=1, description="fraction of the value channels to prune; that of the key channels if null"
    )
    budget_bytes: list[Annotated[float, Field(gt=0, le=1e300)]] = Field(
        default_factory=list,
        max_length=32,
        description="beside or in place of ratios: what an old token may take in all layers, in 16-bit keys and values",
    )
    limits: RunLimits = Field(default_factory=RunLimits)
    config: RunConfig = Field(default_factory=RunConfig)
    name: Text = Field("", max_length=200, description="for people")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "bundle": "0" * 64,
                    "solvers": [{"solver": "greedy"}, {"solver": "branch-and-bound"}],
                    "ratios": [0.6],
                    "limits": {"time_limit": 10},
                    "name": "smollm2, nightly",
                }
            ]
        }
    )

    @property
    def budgets(self) -> list[dict[str, float | None]]:
        """As records have them."""
        ratios = [budget_of({"ratio": ratio, "value_ratio": self.value_ratio}) for ratio in self.ratios]
        return ratios + [budget_of({"budget_bytes": size}) for size in self.budget_bytes]

    @field_validator("solvers")
    @classmethod
    def _each_once(cls, solvers: list[SolverChoice]) -> list[SolverChoice]:
        names = [each.solver for each in solvers]
        if len(set(names)) < len(names):
            raise ValueError("name each solver once; other options are another run")
        return solvers

    @field_validator("ratios", "budget_bytes")
    @classmethod
    def _no_budget_twice(cls, budgets: list[float]) -> list[float]:
        return list(dict.fromkeys(budgets))

    @model_validator(mode="after")
    def _ratios_or_bytes(self) -> Self:
        if not self.ratios and not self.budget_bytes:
            raise ValueError("give ratios or budget_bytes")
        if not self.ratios and self.value_ratio is not None:
            raise ValueError("value_ratio goes with ratios; budget_bytes shares its bytes between keys and values")
        return self


class Bundle(BaseModel):
    """A graph bundle of the service."""

    digest: Digest
    name: str
    nbytes: int
    heads: int
    about: dict[str, str] = Field(description="the file's metadata: model, objective, windows")
    created: str = Field(description="UTC, ISO 8601", examples=["2026-01-31T12:00:00+00:00"])


class Registration(Body):
    """A bundle that lies in the folder ``bundles`` of the service's data folder."""

    path: Text = Field(min_length=1, max_length=1000, examples=["smollm2/graphs.safetensors"])


class SummaryRow(BaseModel):
    """A solver of a run at one budget; see `grace_opt.compare.summarise`."""

    bundle: Digest
    ratio: float | None
    value_ratio: float | None = None
    budget_bytes: float | None = None
    solver: str
    heads: int
    over_best_mean: float | None
    over_best_max: float | None
    gap_mean: float | None
    reference_gap_mean: float | None
    optimal_share: float
    time: float | None = Field(description="shifted geometric mean, seconds")
    errors: int
    no_selection: int
    not_supported: int


class Run(BaseModel):
    """A run."""

    id: int
    bundle: Digest
    state: State
    error: str | None
    request: RunRequest
    total: int = Field(description="records when it is complete")
    done: int = Field(description="records so far")
    reused: int = Field(description="records that were taken from earlier runs")
    submitted_by: str | None
    created: str
    started: str | None
    ended: str | None
    summary: list[SummaryRow] = Field(description="a row for each budget and solver, once complete")


class Mask(BaseModel):
    """The mask of one solver of a run at one budget."""

    run: int
    ratio: float | None
    value_ratio: float | None
    budget_bytes: float | None
    solver: str
    digest: Digest = Field(description="of kv_mask.json: /api/masks/{digest}.json and .safetensors")
    tensors: Digest = Field(description="of kv_mask.safetensors")
    objective_sum: float


class SolverInfo(BaseModel):
    """A solver that can be asked for."""

    solver: str
    guarantee: str
    needs: str
    origin: str
    options: dict[str, Any] = Field(description="names and defaults")
    capabilities: dict[str, Any] | None = Field(
        description="null if it cannot be loaded; ``needs`` says what to install"
    )


class Meta(BaseModel):
    """What this service is and allows."""

    version: str
    api_keys: bool = Field(description="whether requests need a key")
    scope: Scope = Field(description="what this request may do")
    upload_limit: int = Field(description="bytes of a bundle at most")
    queue_limit: int = Field(description="unfinished runs at most")
    workers: int


class Health(BaseModel):
    """Whether the service can do its work."""

    status: Literal["ok", "waiting"]
    trouble: str | None = Field(description="what it waits for")


class Comparison(BaseModel):
    """Runs side by side."""

    runs: list[Run]
    summary: list[dict[str, Any]] = Field(description="the rows of all runs, each with its run's id as ``run``")
    differences: list[dict[str, Any]] = Field(
        description="for each budget, solver and head that all runs have: objectives, and how many channels all prune"
    )


class Failure(BaseModel):
    """Problem details (RFC 9457): what went wrong and what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A part of a list."""

    total: int
    offset: int
    limit: int


class Bundles(Page[Bundle]):
    """Bundles, the newest first."""

    bundles: list[Bundle]


class Runs(Page[Run]):
    """Runs, the newest first."""

    runs: list[Run]


class Records(Page[Record]):
    """Records."""

    records: list[Record]
