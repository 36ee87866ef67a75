"""Short codes by which a guest finds a reservation again on another device."""

from alembic import op

revision = "reservations_0003"
down_revision = "reservations_0002"

# A table of its own, written when a code is first shown: the booking's transaction has nothing to
# do for it, and a program of the revision before doesn't know it.
CODES = """
CREATE TABLE reservation_codes (
    reservation_id uuid PRIMARY KEY,
    code text NOT NULL UNIQUE CHECK (code ~ '^[0-9A-HJKMNP-TV-Z]{10}$')
);
COMMENT ON TABLE reservation_codes IS
    'Who knows the code may see and cancel the reservation; made when it is first shown.';
GRANT SELECT, INSERT ON reservation_codes TO reservation_service;
"""


def upgrade() -> None:
    op.execute(CODES)


def downgrade() -> None:
    op.execute("DROP TABLE reservation_codes")
