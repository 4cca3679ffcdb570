"""What Alembic runs: migrate over the connection that `upgrade` gives, or over the URL of alembic.ini."""

from alembic import context
from sqlalchemy import create_engine

from grace_opt.service.db.tables import Table

connection = context.config.attributes.get("connection")
if connection is None:
    connection = create_engine(context.config.get_main_option("sqlalchemy.url") or "").connect()
context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
