"""budgets: ratios of values and bytes beside the ratio of keys"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = depends_on = None


def upgrade() -> None:
    """budgets: ratios of values and bytes beside the ratio of keys"""
    connection = op.get_bind()
    with op.batch_alter_table("records") as batch_op:
        batch_op.add_column(sa.Column("budget", sa.String(length=60), nullable=True))
        batch_op.add_column(sa.Column("value_ratio", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("budget_bytes", sa.Double(), nullable=True))
    records = sa.table("records", sa.column("ratio", sa.Double()), sa.column("budget", sa.String()))
    for ratio in connection.scalars(sa.select(records.c.ratio).distinct()).all():
        connection.execute(records.update().where(records.c.ratio == ratio).values(budget=named(ratio)))
    with op.batch_alter_table("records") as batch_op:
        batch_op.alter_column("budget", existing_type=sa.String(length=60), nullable=False)
        batch_op.alter_column("ratio", existing_type=sa.Double(), nullable=True)
        batch_op.drop_constraint("records_once", type_="unique")
        batch_op.create_unique_constraint("records_once", ["run", "budget", "solver", "problem"])

    # A primary key cannot be changed everywhere; there are few masks.
    masks = connection.execute(sa.text("SELECT run, ratio, solver, digest, tensors, objective_sum FROM masks"))
    rows = [{**row, "budget": named(row["ratio"])} for row in masks.mappings()]
    op.drop_table("masks")
    made = op.create_table(
        "masks",
        sa.Column("run", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("budget", sa.String(length=60), nullable=False),
        sa.Column("ratio", sa.Double(), nullable=True),
        sa.Column("value_ratio", sa.Double(), nullable=True),
        sa.Column("budget_bytes", sa.Double(), nullable=True),
        sa.Column("solver", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("tensors", sa.String(length=64), nullable=False),
        sa.Column("objective_sum", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run", "budget", "solver"),
    )
    op.create_index(op.f("ix_masks_digest"), "masks", ["digest"], unique=False)
    op.bulk_insert(made, rows)


def named(ratio: float) -> str:
    """As `grace_opt.records.budget_name` named a ratio when this was written."""
    return repr(float(ratio)).removesuffix(".0")
