"""The schemas of both databases, as Alembic revisions, and the one way to run them.

`reservations/versions` and `analytics/versions` are two independent histories that share
`env.py`. This package goes into the wheel, so an installed `reservation-service migrate`
or `data-platform migrate` needs no checkout.
"""

from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

Database = Literal["reservations", "analytics"]


def upgrade(database: Database, url: str, revision: str = "head") -> None:
    """Bring `database` at `url` (a libpq connection string of its owner) up to `revision`.

    Two upgrades at once are safe: the second waits for the first and finds nothing to do.

    Raises:
        psycopg.OperationalError: the server can't be reached.
        sqlalchemy.exc.OperationalError: a table was locked for longer than `lock_timeout`;
            nothing of that revision has happened, so run it again.
    """
    command.upgrade(_config(database, url), revision)


def downgrade(database: Database, url: str, revision: str = "base") -> None:
    """Take `database` back to `revision`. Roles stay: they belong to the server."""
    command.downgrade(_config(database, url), revision)


def head(database: Database) -> str:
    """Return the newest revision of `database`, which a migrated one has in `alembic_version`."""
    revision = ScriptDirectory.from_config(_config(database, "")).get_current_head()
    if revision is None:
        raise RuntimeError(f"no revision of {database} in this installation")
    return revision


def outdated(database: Database) -> frozenset[str]:
    """Return the revisions of `database` that are older than ours.

    Whatever else a database says is our head or newer: in an upgrade the schema goes first, and
    the old code goes on working with it.
    """
    script = ScriptDirectory.from_config(_config(database, ""))
    revisions = {revision.revision for revision in script.walk_revisions()}
    return frozenset(revisions - {head(database)})


def _config(database: Database, url: str) -> Config:
    here = Path(__file__).parent
    config = Config()
    config.set_main_option("script_location", str(here).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    versions = here / database / "versions"
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.attributes["url"] = url  # not an option: a password must not meet interpolation
    return config
