"""What an imported concert is told by when its file comes again; cancellations not yet finished."""

from alembic import op

revision = "reservations_0002"
down_revision = "reservations_0001"

# Both columns are additive: a program of the revision before neither reads nor writes them.
IMPORTS = """
ALTER TABLE concerts ADD COLUMN fingerprint bytea CHECK (octet_length(fingerprint) = 32);
CREATE UNIQUE INDEX concerts_by_fingerprint ON concerts (fingerprint);
COMMENT ON COLUMN concerts.fingerprint IS
    'SHA-256 of what import-concert read, so that the same file makes one concert; else NULL.';
"""

# The index has only the few rows on which a sweep has work to do.
CANCELLATIONS = """
ALTER TABLE performances ADD COLUMN cancelling boolean NOT NULL DEFAULT false
    CHECK (NOT cancelling OR status = 'cancelled');
CREATE INDEX performances_cancelling ON performances (performance_id) WHERE cancelling;
COMMENT ON COLUMN performances.cancelling IS
    'Cancelled, and some of its reservations may not be yet: expire-holds goes on with them.';
"""


def upgrade() -> None:
    op.execute(IMPORTS)
    op.execute(CANCELLATIONS)


def downgrade() -> None:
    op.execute("ALTER TABLE concerts DROP COLUMN fingerprint")
    op.execute("ALTER TABLE performances DROP COLUMN cancelling")
