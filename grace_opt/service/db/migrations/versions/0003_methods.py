"""methods: what runs did before they had a method is said in their requests"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = depends_on = None

#: The same ratio for every head; masks of which what is generated is pruned as it leaves the recent window. Whether
#: protected channels are kept is in ``config``.
BEFORE: dict[str, Any] = {
    "method": "grace-opt",
    "method_options": {"budget": "uniform", "generated": "prune"},
    "value_ratio": None,
    "budget_bytes": [],
}


def upgrade() -> None:
    """methods: what runs did before they had a method is said in their requests"""
    connection = op.get_bind()
    runs = sa.table("runs", sa.column("id", sa.BigInteger()), sa.column("request", sa.JSON()))
    for run, request in connection.execute(sa.select(runs.c.id, runs.c.request)).all():
        connection.execute(runs.update().where(runs.c.id == run).values(request={**BEFORE, **request}))
