"""Alembic's environment for both databases: one connection, bounded waits, one at a time."""

import time

import psycopg
import sqlalchemy
from alembic import context
from sqlalchemy.pool import NullPool

# A migration that waits for a lock makes everyone queue behind it: give up soon, run again.
LOCK_TIMEOUT = "5s"
# "concert-reservation migrations", as one fixed advisory lock key per database.
MIGRATION_LOCK = 0x636F6E63657274
LOCK_WAIT_S = 60.0
LOCK_INTERVAL_S = 0.1


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
        # Held by a connection of its own, without a transaction: its snapshot would be waited for.
        _wait_for_our_turn(lock_connection.execution_options(isolation_level="AUTOCOMMIT"))
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


def _wait_for_our_turn(connection: sqlalchemy.Connection) -> None:
    """Take the lock, asking again and again.

    A statement that waits for it would hold a snapshot, for which CREATE INDEX CONCURRENTLY of
    whoever has the lock would wait in turn.

    Raises:
        sqlalchemy.exc.OperationalError: another migration has had it for LOCK_WAIT_S.
    """
    key = {"key": MIGRATION_LOCK}
    until = time.monotonic() + LOCK_WAIT_S
    while not connection.scalar(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), key):
        if time.monotonic() > until:
            connection.execute(sqlalchemy.text("SET lock_timeout = '1ms'"))
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), key)
        time.sleep(LOCK_INTERVAL_S)


run()
