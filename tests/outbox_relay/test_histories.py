"""A relay whose database or Kafka isn't the one it knew refuses, before it can lose or repeat.

Under exactly_once the cursor lies in Kafka, so each can go back in time without the other.
"""

import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import psycopg
import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient

from devstack.kafka import KafkaCluster
from devstack.postgres import UNPRIVILEGED_USER, PostgresServer, find_installation
from devstack.processes import ConfigurationError
from devstack.state import Run
from tests.databases import ReservationDatabase, create_reservation_database
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import (
    CURSOR_TOPIC_CONFIG,
    ExactlyOnceOutbox,
    make_outbox,
    wait_for_leader,
    with_port,
)
from tests.proxy import BreakableKafka, Proxy
from tests.require import require
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

REFUSAL_TIMEOUT_S = 30.0
RESUME = "outbox-relay resume --from-id N"
CAUGHT_UP = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
EMPTY_SCHEMA = b"""
DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC;
"""
# Ids of transactions and WAL positions beyond those of the original.
OVERTAKE = (
    "DO $$ BEGIN FOR n IN 1..2000 LOOP INSERT INTO overtaking VALUES (n); COMMIT; END LOOP; END $$"
)


@pytest.fixture(scope="module")
def primary(stack_run: Run) -> Iterator[PostgresServer]:
    """A local server, whose data folder can be copied; each test has its own database there."""
    server = PostgresServer(stack_run, "histories-primary")
    try:
        server.start()
    except ConfigurationError as error:
        require(available=False, what=str(error))
    yield server
    server.close()


@pytest.fixture
def outbox(primary: PostgresServer, breakable_kafka: BreakableKafka) -> ExactlyOnceOutbox:
    name = f"histories_{os.urandom(4).hex()}"
    return make_outbox(create_reservation_database(primary, name), breakable_kafka.cluster)


CopyServer = Callable[..., PostgresServer]


@pytest.fixture
def copy_server(
    stack_run: Run, primary: PostgresServer, request: pytest.FixtureRequest
) -> Iterator[CopyServer]:
    """Takes a base backup of the primary; started by the caller, ended with the test."""
    with ExitStack() as cleanup:

        def copy(name: str, stream_from_port: int | None = None) -> PostgresServer:
            """A copy of the primary, as a standby when it shall follow the one at a port."""
            server = PostgresServer(stack_run, f"{name}-{abs(hash(request.node.nodeid))}")
            server._folder.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(server._folder, pwd.getpwnam(UNPRIVILEGED_USER).pw_uid, -1)
            server._password = primary._password
            source = primary.admin_url.replace(f":{primary.port}/", f":{stream_from_port}/")
            server._run_program(
                *("pg_basebackup", "--checkpoint=fast", "--no-sync", "--wal-method=fetch"),
                f"--dbname={source if stream_from_port else primary.admin_url}",
                f"--pgdata={server.data_folder}",
                *(["--write-recovery-conf"] if stream_from_port else []),
            )
            cleanup.callback(server.close)
            return server

        yield copy


def start_copy(server: PostgresServer) -> None:
    server.launch()
    server.wait_ready()


def on(outbox: ExactlyOnceOutbox, server: PostgresServer) -> ExactlyOnceOutbox:
    """The same outbox as it is on another server."""
    return replace(outbox, database=with_port(outbox.database, server.port))


def admin_url(server: PostgresServer, database: str) -> str:
    return f"{server.admin_url.rpartition('/')[0]}/{database}"


def promote(server: PostgresServer) -> None:
    with psycopg.connect(server.admin_url, autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")


def wait_until_replayed(primary: PostgresServer, standby: PostgresServer) -> None:
    with psycopg.connect(primary.admin_url, autocommit=True) as connection:
        found = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    with psycopg.connect(standby.admin_url, autocommit=True) as connection:
        wait_until(
            lambda: connection.execute(CAUGHT_UP, found).fetchone() == (True,), 20, "the replay"
        )


def publish(outbox: ExactlyOnceOutbox, start_relay: StartRelay, *payloads: str) -> None:
    """Let a relay publish these and end well."""
    relay = start_relay(outbox)
    before = sum(map(len, outbox.arrived().values()))
    for payload in payloads:
        outbox.insert("a", payload)
    outbox.wait_for(before + len(payloads))
    assert relay.stop() == 0


def refuse(outbox: ExactlyOnceOutbox, *words: str) -> str:
    """See `run` end with 1 and one line that holds these words."""
    refused = outbox.command("run", timeout_s=REFUSAL_TIMEOUT_S)
    assert refused.returncode == 1, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if not line.startswith("{")]
    for word in words:
        assert word in line
    return line


def first_id(outbox: ExactlyOnceOutbox, payload: str) -> str:
    with outbox.owner() as connection:
        found = connection.execute(
            "SELECT id FROM outbox WHERE topic = %s AND payload::text = %s", (outbox.topic, payload)
        ).fetchone()
    assert found is not None
    return str(found[0])


def resume_from(outbox: ExactlyOnceOutbox, payload: str) -> None:
    """Go on with a row, after a look that changes nothing."""
    where = ("resume", "--from-id", first_id(outbox, payload))
    assert "nothing changed" in outbox.succeed(*where)
    refuse(outbox, RESUME)
    outbox.succeed(*where, "--apply")


def overtake(outbox: ExactlyOnceOutbox) -> None:
    with outbox.owner() as connection:
        connection.execute("CREATE TABLE overtaking (n integer)")
        connection.execute(OVERTAKE)


def test_a_standby_promoted_behind_is_refused_and_resume_loses_nothing(
    outbox: ExactlyOnceOutbox,
    primary: PostgresServer,
    copy_server: CopyServer,
    start_relay: StartRelay,
) -> None:
    with Proxy(lambda: primary.port) as cable:
        standby = copy_server("standby", stream_from_port=cable.port)
        start_copy(standby)
        publish(outbox, start_relay, "1", "2")
        wait_until_replayed(primary, standby)
        there = on(outbox, standby)
        refuse(there, "standby")

        cable.freeze()
        publish(outbox, start_relay, "3", "4")
        promote(standby)
    refuse(there, RESUME)
    # The ids of transactions that were lost are given out again.
    there.insert("a", "5")
    overtake(there)
    refuse(there, RESUME)
    resume_from(there, "5")
    start_relay(there)
    there.insert("a", "6")
    there.wait_for(6)
    assert there.arrived()["a"] == [b"1", b"2", b"3", b"4", b"5", b"6"]


@pytest.mark.parametrize(
    "proof",
    [
        pytest.param(True, id="with proof"),
        pytest.param(False, id="without proof"),
    ],
)
def test_a_standby_promoted_with_everything_is_gone_on_with_where_its_history_proves_it(
    outbox: ExactlyOnceOutbox,
    primary: PostgresServer,
    copy_server: CopyServer,
    start_relay: StartRelay,
    *,
    proof: bool,
) -> None:
    if proof:
        with psycopg.connect(admin_url(primary, outbox.database.name)) as connection:
            connection.execute("GRANT EXECUTE ON FUNCTION pg_read_file(text) TO outbox_relay")
    standby = copy_server("complete", stream_from_port=primary.port)
    start_copy(standby)
    publish(outbox, start_relay, "1", "2")
    outbox.insert("a", "3")
    wait_until_replayed(primary, standby)
    promote(standby)
    there = on(outbox, standby)
    if proof:
        relay = start_relay(there)
        there.insert("a", "4")
        there.settle()
        assert relay.alive
    else:
        refuse(there, RESUME)


@pytest.mark.parametrize("overtaken", [False, True], ids=["behind", "overtaken"])
def test_a_database_restored_to_an_earlier_time_is_refused(
    outbox: ExactlyOnceOutbox,
    copy_server: CopyServer,
    start_relay: StartRelay,
    *,
    overtaken: bool,
) -> None:
    publish(outbox, start_relay, "1", "2")
    restored = copy_server("restored")
    publish(outbox, start_relay, "3", "4")
    start_copy(restored)
    there = on(outbox, restored)
    if overtaken:
        overtake(there)
    there.insert("a", "5")
    refuse(there, RESUME)
    resume_from(there, "5")
    start_relay(there)
    there.wait_for(5)
    assert there.arrived()["a"] == [b"1", b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize(
    "overtaken",
    [
        pytest.param(False, id="behind"),
        pytest.param(True, id="overtaken"),
    ],
)
def test_a_copy_of_the_data_folder_run_elsewhere_neither_publishes_nor_disturbs_production(
    outbox: ExactlyOnceOutbox,
    copy_server: CopyServer,
    start_relay: StartRelay,
    *,
    overtaken: bool,
) -> None:
    relay = start_relay(outbox)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    copy = copy_server("elsewhere")
    outbox.insert("a", "2")
    outbox.wait_for(2)
    # A second later at the latest Postgres knows of it, and Kafka of that.
    wait_until(lambda: published_rows(outbox) == 2, 10, "the cursor's copy")
    outbox.insert("a", "3")
    outbox.wait_for(3)
    start_copy(copy)
    there = on(outbox, copy)
    if overtaken:
        overtake(there)
    there.insert("a", '"of the copy"')
    leave_production_alone(outbox, there, relay.pid)
    assert outbox.arrived()["a"] == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("restored", [True, False], ids=["restored dump", "new database"])
def test_another_database_under_the_same_name_neither_publishes_nor_disturbs_production(
    outbox: ExactlyOnceOutbox,
    reservation_database: ReservationDatabase,
    postgres_server: PostgresServer,
    start_relay: StartRelay,
    *,
    restored: bool,
) -> None:
    relay = start_relay(outbox)
    for payload in ("1", "2", "3"):
        outbox.insert("a", payload)
    outbox.wait_for(3)
    there = replace(outbox, database=reservation_database)
    if restored:
        restore_dump(outbox.database.owner_url, postgres_server, reservation_database.name)
    else:
        with there.owner() as connection:
            # Topics that its Kafka hasn't would be waited for, beside the one that refuses.
            connection.execute("DELETE FROM outbox_topics")
            connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000)", (there.topic,))
    there.insert("a", '"of the copy"')
    leave_production_alone(outbox, there, relay.pid)
    assert outbox.arrived()["a"] == [b"1", b"2", b"3", b"4"]


def restore_dump(source_url: str, server: PostgresServer, name: str) -> None:
    programs = find_installation().programs
    dump = subprocess.run(
        [programs / "pg_dump", source_url],
        check=True,
        capture_output=True,
        timeout=60,
    )
    restore = subprocess.run(
        [
            *(programs / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"),
            admin_url(server, name),
        ],
        input=EMPTY_SCHEMA + dump.stdout,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert restore.returncode == 0, restore.stderr


def leave_production_alone(
    outbox: ExactlyOnceOutbox, copy: ExactlyOnceOutbox, leader_pid: int
) -> None:
    """See the copy's relay refuse while production goes on in the same term."""
    epoch = cursor_column(outbox, "leader_epoch")
    refuse(copy, RESUME)
    outbox.insert("a", "4")
    outbox.settle()
    assert cursor_column(outbox, "leader_epoch") == epoch
    assert str(outbox.status()["leader"]).endswith(f":{leader_pid}")


def published_rows(outbox: ExactlyOnceOutbox) -> int:
    return cursor_column(outbox, "published_rows")


def cursor_column(outbox: ExactlyOnceOutbox, column: str) -> int:
    with outbox.owner() as connection:
        found = connection.execute(
            "SELECT to_jsonb(c) ->> %s FROM outbox_relay_cursor AS c WHERE topic = %s",
            (column, outbox.topic),
        ).fetchone()
    return 0 if found is None else int(found[0])


# ---- Kafka's history


def recreate(cluster: KafkaCluster, topic: str, partitions: int, **config: str) -> None:
    """Delete a topic and make it again, empty."""
    admin = AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    admin.delete_topics([topic])[topic].result(20)

    def made() -> bool:
        try:
            cluster.create_topic(topic, partitions, config)
        except KafkaException:  # it is still being deleted
            return False
        return True

    wait_until(made, 20, f"topic {topic} to be made again")


def fill(bootstrap_servers: str, topic: str, partitions: int) -> None:
    """Put more strange records into each partition than a test has written."""
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    for number in range(20 * partitions):
        producer.produce(topic, b"{}", b"stranger", partition=number % partitions)
    assert producer.flush(20) == 0


def test_a_cursor_topic_that_lost_its_cursor_is_refused(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    publish(outbox, start_relay, "1", "2")
    recreate(breakable_kafka.cluster, outbox.cursor_topic, 1, **CURSOR_TOPIC_CONFIG)
    outbox.insert("a", "3")
    refuse(outbox, RESUME, outbox.topic)
    resume_from(outbox, "3")
    start_relay(outbox)
    outbox.settle()


@pytest.mark.parametrize("refilled", [False, True], ids=["empty", "filled again by others"])
def test_a_recreated_topic_of_events_is_refused(
    outbox: ExactlyOnceOutbox,
    start_relay: StartRelay,
    breakable_kafka: BreakableKafka,
    *,
    refilled: bool,
) -> None:
    publish(outbox, start_relay, "1", "2")
    recreate(breakable_kafka.cluster, outbox.topic, 3)
    if refilled:
        fill(outbox.bootstrap_servers, outbox.topic, 3)
    outbox.insert("a", "3")
    refuse(outbox, RESUME, outbox.topic)
    resume_from(outbox, "1")
    start_relay(outbox)
    wait_until(lambda: outbox.arrived().get("a") == [b"1", b"2", b"3"], 30, "all of them again")


def test_a_move_to_another_kafka_cluster_needs_resume(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, kafka: KafkaCluster
) -> None:
    publish(outbox, start_relay, "1", "2")
    kafka.create_topic(outbox.topic, 3)
    kafka.create_topic(outbox.cursor_topic, 1, CURSOR_TOPIC_CONFIG)
    there = replace(outbox, bootstrap_servers=kafka.bootstrap_servers)
    there.insert("a", "3")
    refuse(there, RESUME)
    resume_from(there, "3")
    relay = start_relay(there)
    wait_for_leader(there, relay)
    there.insert("a", "4")
    there.wait_for(2)
    assert there.arrived()["a"] == [b"3", b"4"]
    relay.stop()
    # And back: its old cursor there is not taken for the newer one.
    refuse(outbox, RESUME)
