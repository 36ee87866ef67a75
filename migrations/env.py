"""Alembic's environment for both databases: one connection, bounded waits, one at a time."""

import psycopg
import sqlalchemy
from alembic import context
from sqlalchemy.pool import NullPool

# A migration that waits for a lock makes everyone queue behind it: give up soon, run again.
LOCK_TIMEOUT = "5s"
# "concert-reservation migrations", as one fixed advisory lock key per database.
MIGRATION_LOCK = 0x636F6E63657274


def run() -> None:
    """Run the revisions that Alembic's command asked for, each in its own transaction."""
    url: str = context.config.attributes["url"]
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        # libpq reads the URL itself, so everything it knows (TLS, services, sockets) works.
        creator=lambda: psycopg.connect(
            url,
            options=f"-c lock_timeout={LOCK_TIMEOUT} -c search_path=public",
            application_name="migrations",
            connect_timeout=10,
        ),
        poolclass=NullPool,
    )
    with engine.connect() as lock_connection, engine.connect() as connection:
        # Held by a connection of its own, which commits nothing in between.
        lock_connection.execute(sqlalchemy.text("SET lock_timeout = '60s'"))
        lock_connection.execute(
            sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK}
        )
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


run()
