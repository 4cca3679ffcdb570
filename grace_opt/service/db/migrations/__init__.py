"""Alembic's migrations of the service's tables.

A new one: change ``tables.py``, then
``alembic -c grace_opt/service/db/migrations/alembic.ini revision --autogenerate -m WHAT``
against a database at the newest version, and read what it made. A test compares the two.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine


def upgrade(engine: Engine) -> None:
    """Bring the tables up to date. Raises alembic's CommandError if they are newer than this package."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
