"""Roles belong to the server, not to a database.

They are made if missing, without a password (the operator gives one with ALTER ROLE), and kept on
downgrade: another database of the server may use them.
"""

import re

# A role that a migration of another database has just made is as good as our own.
MAKE_MISSING = """
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY string_to_array('{names}', ' ') LOOP
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
                EXECUTE format('CREATE ROLE %I LOGIN', wanted);
            END IF;
        EXCEPTION
            WHEN duplicate_object OR unique_violation THEN NULL;
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION 'role % is missing and this user may not create it', wanted
                    USING HINT = format('As an administrator: CREATE ROLE %I LOGIN;', wanted);
        END;
    END LOOP;
END
$$
"""


def missing_roles(*names: str) -> str:
    """Return the statement that makes those of the roles `names` that don't exist yet."""
    if not all(re.fullmatch(r"[a-z_]+", name) for name in names):
        raise ValueError(f"no plain role names: {names}")
    return MAKE_MISSING.replace("{names}", " ".join(names))
