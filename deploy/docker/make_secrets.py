# ruff: noqa: INP001 - mounted into a container, alone
"""Make what `docker compose up` needs to know, once: random, a folder for each who may read it.

Each folder below /run/secrets is a volume of its own. A password lies where its database reads it
and, as a URL, where its role does. What exists stays; a deleted password is made anew, and the
URLs follow. Then let the databases know and start the programs again (docs/operations.md).
"""

import os
import secrets
from pathlib import Path

ROOT = Path("/run/secrets")

# database → role → the file that gets the role's URL; the superuser's has none.
URLS = {
    "reservations": {
        "postgres": None,
        "reservation_owner": "owners/reservations-url",
        "reservation_service": "service/database-url",
        "outbox_relay": "relay/database-url",
    },
    "analytics": {
        "postgres": None,
        "analytics_owner": "owners/analytics-url",
        "data_platform": "worker/database-url",
        "analyst": "analyst/database-url",
    },
}
OTHERS = ("service/secret-key", "service/admin-token", "grafana/admin-password")


def main() -> None:
    """Make all that is missing."""
    for database, roles in URLS.items():
        for role, url in roles.items():
            password = kept(ROOT / f"{database}-db" / role)
            if url:
                write(
                    ROOT / url,
                    f"postgresql://{role}:{password}@{database}-db:5432/{database}",
                )
    for name in OTHERS:
        kept(ROOT / name)


def kept(path: Path) -> str:
    """Return the secret in a file, made when it is missing."""
    if not path.exists():
        write(path, secrets.token_urlsafe(36))
    return path.read_text(encoding="ascii")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; whoever has its volume may read it."""
    if path.exists() and path.read_text(encoding="ascii") == text:
        return
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.chmod(0o444)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
