"""The table of errors: what puts a record aside and what is waited out."""

import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException
from psycopg import errors as pg

from data_platform.errors import Cure, KafkaTroubleError, MostlyRefusedError, cure_of
from tests.databases import AnalyticsDatabase

WAITED_OUT = [
    pg.ConnectionFailure,
    pg.SerializationFailure,
    pg.DeadlockDetected,
    pg.DiskFull,
    pg.TooManyConnections,
    pg.LockNotAvailable,
    pg.QueryCanceled,
    pg.AdminShutdown,
    pg.CannotConnectNow,
    pg.UndefinedTable,
    pg.UndefinedColumn,
    pg.InsufficientPrivilege,
    pg.ForeignKeyViolation,
    pg.CheckViolation,  # without a constraint's name
    pg.ReadOnlySqlTransaction,
    pg.IdleInTransactionSessionTimeout,
    pg.InvalidPassword,
    pg.InvalidCatalogName,
    pg.InternalError_,
    psycopg.OperationalError,
    psycopg.InterfaceError,
    MostlyRefusedError,
    KafkaTroubleError,
]
PUT_ASIDE = [
    pg.NumericValueOutOfRange,
    pg.DatetimeFieldOverflow,
    pg.CharacterNotInRepertoire,
    pg.NotNullViolation,
    pg.UniqueViolation,
    pg.ProgramLimitExceeded,
    psycopg.DataError,
    RecursionError,
]


@pytest.mark.parametrize("kind", WAITED_OUT)
def test_what_may_heal_is_waited_out(kind: type[Exception]) -> None:
    assert cure_of(kind("x")) is Cure.WAIT


@pytest.mark.parametrize("kind", PUT_ASIDE)
def test_what_the_record_contains_puts_it_aside(kind: type[Exception]) -> None:
    assert cure_of(kind("x")) is Cure.DEAD_LETTER


def test_every_sqlstate_has_a_cure_and_none_ends_the_worker() -> None:
    kinds = [kind for kind in vars(pg).values() if _is_error(kind)]
    assert len(kinds) > 200
    assert Cure.END not in {cure_of(kind("x")) for kind in kinds}


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, psycopg.Error) and kind.sqlstate is not None


def test_a_named_check_is_about_the_record(analytics_database: AnalyticsDatabase) -> None:
    with (
        psycopg.connect(analytics_database.owner_url) as connection,
        pytest.raises(pg.CheckViolation) as caught,
    ):
        connection.execute(
            "INSERT INTO analytics.load_offsets (topic, kafka_partition, next_offset, topic_id)"
            " VALUES ('t', -1, 0, 'x')"
        )
    assert cure_of(caught.value) is Cure.DEAD_LETTER


def test_a_text_that_cannot_be_sent_is_about_the_record(
    analytics_database: AnalyticsDatabase,
) -> None:
    with psycopg.connect(analytics_database.owner_url, autocommit=True) as connection:
        for text in ("a\0b", "a\ud800b"):
            with pytest.raises((psycopg.DataError, UnicodeEncodeError)) as caught:
                connection.execute("SELECT %s::text", (text,))
            assert cure_of(caught.value) is Cure.DEAD_LETTER


def test_a_kafka_error_is_waited_out_unless_it_is_fatal() -> None:
    assert cure_of(KafkaException(KafkaError(KafkaError._TIMED_OUT))) is Cure.WAIT
    fatal = KafkaError(KafkaError._FATAL, "x", True)
    assert cure_of(KafkaException(fatal)) is Cure.END


def test_a_fault_of_ours_ends_the_worker() -> None:
    assert cure_of(TypeError("x")) is Cure.END
