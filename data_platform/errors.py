"""What an error means for the loader: one table, cause → what is done.

Guarantees: only what a record itself contains makes it a dead letter. Whatever may heal without
that record changing (a server away, a lock, a missing table or right) is waited out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import psycopg
from confluent_kafka import KafkaError, KafkaException
from psycopg import errors as pg


class Cure(Enum):
    """What the loader does about an error."""

    DEAD_LETTER = "find the records that cause it and put them aside"
    WAIT = "pause, keep the heartbeats, try again with back-off"
    END = "end the process: restarting it is the only way on"


class MostlyRefusedError(Exception):
    """Postgres refuses most of what comes: it's us, not the records. Nothing is put aside."""


class PlaceLostError(Exception):
    """Postgres or Kafka no longer stands where the batch begins: drop it and look again."""


class RivalError(Exception):
    """Another worker loads the same events at this moment: nothing is wrong with them."""


class KafkaTroubleError(Exception):
    """Kafka doesn't have, or doesn't tell, what is needed to go on; it may later."""


@dataclass(frozen=True)
class Rule:
    """The first rule that matches an error decides."""

    matches: Callable[[BaseException], bool]
    cure: Cure
    why: str


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _sqlstate(*prefixes: str) -> Callable[[BaseException], bool]:
    return lambda error: (
        isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(prefixes)
    )


def _unnamed_check(error: BaseException) -> bool:
    return isinstance(error, pg.CheckViolation) and not error.diag.constraint_name


def _unsent(error: BaseException) -> bool:
    return isinstance(error, psycopg.DataError) and error.sqlstate is None


def _fatal_in_kafka(error: BaseException) -> bool:
    # A consumer reports it as a message whose error has this code and no `fatal()`.
    return isinstance(error, KafkaException) and (
        bool(error.args[0].fatal()) or error.args[0].code() == KafkaError._FATAL  # noqa: SLF001 - a public name
    )


TABLE = (
    Rule(_is(MostlyRefusedError), Cure.WAIT, "a fault of ours must not empty a topic"),
    Rule(_is(RivalError), Cure.WAIT, "when the other one has committed, we see what it did"),
    Rule(_sqlstate("23503"), Cure.WAIT, "the referenced row may still come"),
    Rule(_unnamed_check, Cure.WAIT, "no constraint's name: a partition is missing"),
    Rule(_sqlstate("22", "23", "54"), Cure.DEAD_LETTER, "the value doesn't fit the table"),
    Rule(_sqlstate("08", "40", "42", "53", "55", "57"), Cure.WAIT, "server, schema, rights, locks"),
    Rule(_unsent, Cure.DEAD_LETTER, "without an SQLSTATE: psycopg couldn't send the value (NUL)"),
    Rule(_is(UnicodeEncodeError), Cure.DEAD_LETTER, "a lone surrogate can't be sent"),
    Rule(_is(RecursionError), Cure.DEAD_LETTER, "nested deeper than can be read"),
    Rule(_is(psycopg.Error), Cure.WAIT, "the connection, and whatever else the server says"),
    Rule(_fatal_in_kafka, Cure.END, "librdkafka can't go on with this client"),
    Rule(_is(KafkaException, KafkaTroubleError), Cure.WAIT, "brokers, coordinator, rights, topic"),
)


def cure_of(error: BaseException) -> Cure:
    """Say what is done about `error`. What the table doesn't know is a fault of ours: END."""
    return next((rule.cure for rule in TABLE if rule.matches(error)), Cure.END)


def told(error: BaseException) -> str:
    """Say what an error is, for a log or a terminal: without what the record contains.

    Postgres quotes the row it refuses (DETAIL, CONTEXT), and the value in some messages; both
    belong to the dead letter only. Python quotes values too: of an error that isn't ours,
    Kafka's or the system's only the kind is told.
    """
    kind = type(error).__name__
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        speaks = isinstance(error, psycopg.Error | KafkaException | OSError) or (
            type(error).__module__.startswith("data_platform.")
        )
        hidden = not speaks or isinstance(error, psycopg.DataError)
        return kind if hidden else f"{kind}: {error}".strip()
    about = " ".join(filter(None, (error.diag.constraint_name, error.diag.column_name)))
    primary = "" if error.sqlstate.startswith("22") else f": {error.diag.message_primary}"
    return f"{kind} {error.sqlstate}{primary}{f' ({about})' if about else ''}"
