"""The table of errors: what puts a record aside and what is waited out.

Every row of it is met by an error that a real server, driver or interpreter has raised.
"""

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException
from psycopg import errors as pg

from data_platform.errors import (
    TABLE,
    Cure,
    KafkaTroubleError,
    MostlyRefusedError,
    RivalError,
    cure_of,
    told,
)
from data_platform.topics import Topics
from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from devstack.processes import Process
from tests.conftest import MakePostgresServer, UniqueTopic
from tests.data_platform.conftest import MakePlatform, Platform
from tests.data_platform.histories import expected_facts, expected_states, history
from tests.data_platform.test_outages import said
from tests.databases import AnalyticsDatabase, create_analytics_database
from tests.proxy import Proxy
from tests.require import require
from tests.waiting import wait_until

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


@pytest.mark.parametrize("kind", [RivalError, MostlyRefusedError, KafkaTroubleError])
def test_what_somebody_else_has_to_do_first_is_waited_out(kind: type[Exception]) -> None:
    assert cure_of(kind()) is Cure.WAIT


def test_a_fault_of_ours_ends_the_worker() -> None:
    assert cure_of(TypeError("x")) is Cure.END


# ---- every row, by a real error

KEYED = "CREATE TABLE t (id integer PRIMARY KEY, n integer NOT NULL)"
KEYED_BY_NAME = "CREATE TABLE t (name text PRIMARY KEY, n integer NOT NULL)"


def _raised(*statements: str) -> Callable[[str], None]:
    def act(url: str) -> None:
        with psycopg.connect(url, autocommit=True) as session:
            for statement in statements:
                session.execute(statement.encode())

    return act


def _deadlock(url: str) -> None:
    raised: list[BaseException] = []

    def lock(session: psycopg.Connection, number: int) -> None:
        try:
            session.execute("SELECT FROM t WHERE id = %s FOR UPDATE", [number])
        except pg.DeadlockDetected as error:  # one of the two is told
            raised.append(error)
            session.rollback()

    with psycopg.connect(url) as first, psycopg.connect(url) as second:
        first.execute(KEYED)
        first.execute("INSERT INTO t VALUES (1, 1), (2, 2)")
        first.commit()
        lock(first, 1)
        lock(second, 2)
        other = threading.Thread(target=lock, args=(second, 1))
        other.start()
        lock(first, 2)
        first.rollback()
        other.join(10)
    raise raised[0]


def _serialization(url: str) -> None:
    with psycopg.connect(url) as late, psycopg.connect(url, autocommit=True) as quick:
        quick.execute(KEYED)
        quick.execute("INSERT INTO t VALUES (1, 1)")
        late.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        late.execute("SELECT FROM t")
        quick.execute("UPDATE t SET n = 2")
        late.execute("UPDATE t SET n = 3")


def _ended(url: str) -> None:
    with psycopg.connect(url) as session, psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [session.info.backend_pid])
        session.execute("SELECT 1")


def _refused(url: str) -> None:
    parts = urlsplit(url)
    psycopg.connect(url.replace(f":{parts.port}/", ":1/"))


def _deep(_url: str) -> None:
    json.loads("[" * 100_000)


def _surrogate(url: str) -> None:
    with psycopg.connect(url) as session:
        session.execute("SELECT %s::text", ("a\ud800b",))


def _unsent_nul(url: str) -> None:
    with psycopg.connect(url) as session:
        session.execute("SELECT %s::text", ("a\0b",))


def _closed(url: str) -> None:
    session = psycopg.connect(url)
    session.close()
    session.execute("SELECT 1")


REAL: dict[str, tuple[Callable[[str], None], str | None, Cure]] = {
    "referenced row missing": (
        _raised(KEYED, "CREATE TABLE u (t integer REFERENCES t)", "INSERT INTO u VALUES (1)"),
        "23503",
        Cure.WAIT,
    ),
    "partition missing": (
        _raised("CREATE TABLE t (a integer) PARTITION BY LIST (a)", "INSERT INTO t VALUES (1)"),
        "23514",
        Cure.WAIT,
    ),
    "a number out of range": (_raised("SELECT 3000000000::integer"), "22003", Cure.DEAD_LETTER),
    "no date": (_raised("SELECT '2027-02-30'::date"), "22008", Cure.DEAD_LETTER),
    "a null": (_raised(KEYED, "INSERT INTO t VALUES (1, NULL)"), "23502", Cure.DEAD_LETTER),
    "a duplicate": (
        _raised(KEYED, "INSERT INTO t VALUES (1, 1), (1, 1)"),
        "23505",
        Cure.DEAD_LETTER,
    ),
    "too large for an index": (
        _raised(
            "CREATE TABLE t (a text PRIMARY KEY)",
            "INSERT INTO t SELECT string_agg(md5(n::text), '') FROM generate_series(1, 2000) n",
        ),
        "54000",
        Cure.DEAD_LETTER,
    ),
    "deadlock": (_deadlock, "40P01", Cure.WAIT),
    "serialization failure": (_serialization, "40001", Cure.WAIT),
    "table missing": (_raised("SELECT FROM nowhere"), "42P01", Cure.WAIT),
    "right missing": (_raised("SELECT FROM pg_authid"), "42501", Cure.WAIT),
    "statement timeout": (
        _raised("SET statement_timeout = 20", "SELECT pg_sleep(5)"),
        "57014",
        Cure.WAIT,
    ),
    "session ended": (_ended, "57P01", Cure.WAIT),
    "server away": (_refused, None, Cure.WAIT),
    "connection closed": (_closed, None, Cure.WAIT),
    "a NUL": (_unsent_nul, None, Cure.DEAD_LETTER),
    "a lone surrogate": (_surrogate, None, Cure.DEAD_LETTER),
    "too deep": (_deep, None, Cure.DEAD_LETTER),
}


def _caught(act: Callable[[str], None], url: str) -> BaseException:
    try:
        act(url)
    except Exception as error:  # noqa: BLE001 - it is what is asked for
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("cause", REAL)
def test_a_real_error_has_its_cure(cause: str, analytics_database: AnalyticsDatabase) -> None:
    act, sqlstate, cure = REAL[cause]
    error = _caught(act, analytics_database.owner_url)
    assert (getattr(error, "sqlstate", None), cure_of(error)) == (sqlstate, cure)


SECRET = "customer-4711"
WITH_A_SECRET = {
    "a failing row": (KEYED_BY_NAME, "INSERT INTO t VALUES ('customer-4711', NULL)"),
    "a duplicate": (
        KEYED_BY_NAME,
        "INSERT INTO t VALUES ('customer-4711', 1), ('customer-4711', 2)",
    ),
    "a value": ("SELECT 'customer-4711'::integer",),
    "a partition": (
        "CREATE TABLE t (name text PRIMARY KEY) PARTITION BY LIST (name)",
        "INSERT INTO t VALUES ('customer-4711')",
    ),
}


@pytest.mark.parametrize("cause", WITH_A_SECRET)
def test_a_log_tells_an_error_without_the_record(
    cause: str, analytics_database: AnalyticsDatabase
) -> None:
    error = _caught(_raised(*WITH_A_SECRET[cause]), analytics_database.owner_url)
    assert SECRET in str(error)
    assert SECRET not in told(error)
    assert str(getattr(error, "sqlstate", None)) in told(error)


def test_every_row_of_the_table_is_met_by_a_real_error(
    postgres_server: PostgresServer, kafka: KafkaCluster
) -> None:
    # Of ours; test_dead_letters and the loader's tests meet them.
    met = {_rule(MostlyRefusedError()), _rule(RivalError())}
    for number, (act, _, _) in enumerate(REAL.values()):
        name = f"errors_{number}"
        postgres_server.create_database(name, "errors_owner")
        url = postgres_server.url(
            name, "errors_owner", postgres_server.give_password("errors_owner")
        )
        met.add(_rule(_caught(act, url)))
        postgres_server.drop_database(name)
    with pytest.raises(KafkaTroubleError) as missing:
        Topics({"bootstrap.servers": kafka.bootstrap_servers}).topic_id("nowhere")
    met.add(_rule(missing.value))
    # test_outages meets it: a fenced static member.
    met.add(_rule(KafkaException(KafkaError(KafkaError._FATAL, "x", True))))
    assert met == set(range(len(TABLE)))


def _rule(error: BaseException) -> int:
    return next(number for number, rule in enumerate(TABLE) if rule.matches(error))


# ---- and through a worker


def _recovers(platform: Platform, worker: Process, cause: str, heal: Callable[[], object]) -> None:
    """The worker has said once that it waits for `cause`; healed, it goes on as if nothing was."""
    wait_until(lambda: said(worker, "waiting") == 1, 30, "the worker to wait")
    assert cause in worker.log.read_text()
    heal()
    wait_until(lambda: said(worker, "going_on") == 1, 30, "the worker to go on")
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "everything to be loaded")
    assert said(worker, "waiting") == 1
    assert "partitions_revoked" not in worker.log.read_text()  # its membership was kept
    assert platform.dead_letters() == []
    assert worker.alive


def test_a_full_disk_is_waited_out(
    make_platform: MakePlatform,
    make_postgres_server: MakePostgresServer,
    kafka: KafkaCluster,
    unique_topic: UniqueTopic,
    small_disk: Path,
) -> None:
    server = make_postgres_server()
    platform = make_platform(create_analytics_database(server), kafka, unique_topic(6))
    space = small_disk / "space"
    space.mkdir()
    user = server.data_folder.stat()
    os.chown(space, user.st_uid, user.st_gid)
    with psycopg.connect(server.admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE TABLESPACE small LOCATION '{space}'".encode())
        admin.execute("GRANT CREATE ON TABLESPACE small TO PUBLIC")
    platform.execute("ALTER TABLE analytics.fct_reservation_events SET TABLESPACE small")
    # The disk is full of something else.
    (small_disk / "ballast").write_bytes(b"x" * (_free_bytes(small_disk) - 16_384))
    worker = platform.worker()
    events = history(1_000, seed=51)
    platform.produce(events)
    _recovers(platform, worker, "DiskFull", (small_disk / "ballast").unlink)
    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 8 MiB that Postgres may write to; only root can make one."""
    require(os.geteuid() == 0, "root, to mount a small disk")
    # Below a folder that the server's user may enter.
    folder = Path(tempfile.mkdtemp(prefix="small-disk-", dir="/var/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0777", "tmpfs", folder],  # noqa: S607
        check=False,
    )
    require(mounted.returncode == 0, "the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607
    folder.rmdir()


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_bsize


def test_a_worker_that_loses_a_deadlock_tries_again(platform: Platform) -> None:
    worker = platform.worker()
    platform.produce(before := history(20, seed=52))
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "the beginning")
    with psycopg.connect(platform.database.owner_url) as rival:
        # Never told itself: the worker looks after one second, and is told.
        rival.execute("LOCK TABLE analytics.fct_reservation_events IN EXCLUSIVE MODE")
        platform.produce(after := history(20, seed=53))
        wait_until(lambda: _waits_for_a_lock(platform), 10, "the worker to wait for the facts")
        with suppress(pg.DeadlockDetected):
            rival.execute("SELECT FROM analytics.load_offsets FOR UPDATE")
        _recovers(platform, worker, "DeadlockDetected", rival.rollback)
    assert platform.facts() == expected_facts([*before, *after])


def _waits_for_a_lock(platform: Platform) -> bool:
    return bool(
        platform.rows(
            "SELECT FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE NOT granted"
            " AND application_name = 'data-platform' AND datname = current_database()"
        )
    )


def test_a_connection_lost_in_copy_is_made_anew(
    make_platform: MakePlatform,
    analytics_database: AnalyticsDatabase,
    kafka: KafkaCluster,
    unique_topic: UniqueTopic,
) -> None:
    direct = urlsplit(analytics_database.loader_url)
    proxy = Proxy(lambda: int(direct.port or 0))
    try:
        behind = replace(
            analytics_database,
            loader_url=analytics_database.loader_url.replace(f":{direct.port}/", f":{proxy.port}/"),
        )
        platform = make_platform(behind, kafka, unique_topic(6))
        worker = platform.worker()
        platform.produce(before := history(20, seed=54))
        wait_until(lambda: len(platform.facts()) == len(before), 30, "the beginning")
        proxy.freeze_at(lambda sent: b"COPY " in sent, after=True)
        platform.produce(after := history(20, seed=55))
        wait_until(lambda: proxy.frozen, 20, "the worker to be in COPY")
        proxy.cut()
        _recovers(platform, worker, "OperationalError", proxy.open)
        assert platform.facts() == expected_facts([*before, *after])
    finally:
        proxy.close()
