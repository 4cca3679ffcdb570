"""The tables. Times are UTC in ISO 8601, to be shown, never compared: clocks jump. Columns that a record has bear
the names of its fields. ``migrations`` makes the tables."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

BUDGET_LENGTH = 60  #: of `grace_opt.records.budget_name`: two numbers of at most 24 characters
Identity = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows itself only for INTEGER


class State(StrEnum):
    """How far a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETE = "complete"
    CANCELLED = "cancelled"
    FAILED = "failed"  #: it could not be run at all; ``error`` says why


UNFINISHED = (State.QUEUED, State.RUNNING)


class Table(DeclarativeBase):
    """All tables."""


class Bundle(Table):
    """A graph bundle; the file is the blob of its digest."""

    __tablename__ = "bundles"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)  #: sha256 of the file
    name: Mapped[str] = mapped_column(String(200))
    nbytes: Mapped[int] = mapped_column(BigInteger)
    heads: Mapped[int]
    about: Mapped[dict[str, Any]] = mapped_column(JSON)  #: the file's metadata
    created: Mapped[str] = mapped_column(String(32))


class Run(Table):
    """A run: every solver on every head of a bundle at every ratio."""

    __tablename__ = "runs"
    __table_args__ = (Index("runs_state", "state"), {"sqlite_autoincrement": True})  # a number is never used again

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    bundle: Mapped[str] = mapped_column(ForeignKey("bundles.digest"))
    state: Mapped[State] = mapped_column(String(10))
    error: Mapped[str | None] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    total: Mapped[int]  #: records when it is complete
    done: Mapped[int] = mapped_column(default=0)  #: records so far
    reused: Mapped[int] = mapped_column(default=0)  #: of which so many were taken from earlier runs
    submitted_by: Mapped[str | None] = mapped_column(String(100))  #: name of the API key
    idempotency_key: Mapped[str | None] = mapped_column(String(255), unique=True)
    created: Mapped[str] = mapped_column(String(32))
    started: Mapped[str | None] = mapped_column(String(32))
    ended: Mapped[str | None] = mapped_column(String(32))
    summary: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)


class Record(Table):
    """One head, budget and solver of a run. ``body`` is the record as JSON; columns are for filters and sorting.

    ``budget`` is the name of the three fields after it, since NULLs are never equal to each other.
    """

    __tablename__ = "records"
    __table_args__ = (
        UniqueConstraint("run", "budget", "solver", "problem", name="records_once"),
        Index("records_gap", "run", "gap"),
        Index("records_reference_gap", "run", "reference_gap"),
        Index("records_time", "run", "time_ns"),
        Index("records_status", "run", "status"),
        Index("records_problem", "run", "problem"),
        Index("records_solved", "digest", "solver", "recipe"),
    )

    id: Mapped[int] = mapped_column(Identity, primary_key=True)
    run: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    problem: Mapped[str] = mapped_column(String(200))
    budget: Mapped[str] = mapped_column(String(BUDGET_LENGTH))
    ratio: Mapped[float | None]
    value_ratio: Mapped[float | None]
    budget_bytes: Mapped[float | None]
    solver: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64))
    recipe: Mapped[str] = mapped_column(String(64))  #: sha256 of options, limits, seed and threads
    status: Mapped[str] = mapped_column(String(20))
    limit: Mapped[str] = mapped_column(String(20))
    objective: Mapped[float | None]
    gap: Mapped[float | None]
    reference_gap: Mapped[float | None]
    over_best: Mapped[float | None]
    time_ns: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[str] = mapped_column(Text)


class Mask(Table):
    """The mask of one solver of a run at one budget; its two files are blobs."""

    __tablename__ = "masks"

    run: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    budget: Mapped[str] = mapped_column(String(BUDGET_LENGTH), primary_key=True)
    ratio: Mapped[float | None]
    value_ratio: Mapped[float | None]
    budget_bytes: Mapped[float | None]
    solver: Mapped[str] = mapped_column(String(100), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)  #: sha256 of kv_mask.json, which has the other's
    tensors: Mapped[str] = mapped_column(String(64))  #: sha256 of kv_mask.safetensors
    objective_sum: Mapped[float]


class ApiKey(Table):
    """An API key, of which only the sha256 is kept (keys are 256 random bits: no salt or slow hash is needed)."""

    __tablename__ = "api_keys"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scope: Mapped[str] = mapped_column(String(10))
    created: Mapped[str] = mapped_column(String(32))
