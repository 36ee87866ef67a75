"""What the doctor finds, on servers that are really so."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from threading import Event

import psycopg
import pytest
from confluent_kafka import Producer

import migrations
from devstack.kafka import KafkaCluster
from outbox_relay import doctor, leadership, sql, topics
from outbox_relay.config import Settings
from outbox_relay.doctor import Finding
from tests.conftest import MakeKafkaCluster, MakePostgresServer
from tests.databases import ReservationDatabase, create_reservation_database
from tests.outbox_relay.conftest import Outbox
from tests.waiting import wait_until

WRITE = "INSERT INTO outbox (topic, key, payload) VALUES ('concert-reservation', 'k', '{}')"


def settings(database_url: str, kafka_bootstrap_servers: str, name: str = "r") -> Settings:
    return Settings(
        outbox_relay_database_url=database_url,
        kafka_bootstrap_servers=kafka_bootstrap_servers,
        outbox_relay_name=name,
    )


def examined(database: ReservationDatabase, kafka: KafkaCluster) -> list[Finding]:
    return doctor.examine_all(settings(database.relay_url, kafka.bootstrap_servers))


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def only(findings: list[Finding], name: str) -> Finding:
    (finding,) = named(findings, name)
    return finding


def test_a_migrated_database_in_order_has_nothing_wrong_but_no_leader(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    found = examined(reservation_database, kafka)
    of_postgres = [one for one in found if not one.name.startswith(("kafka", "topic", "__"))]
    assert [one for one in of_postgres if one.level != "ok"] == [
        Finding("warning", "leader", "no relay called r runs", "start outbox-relay run")
    ]


def test_the_session_that_holds_rows_back_is_named_without_its_data(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with psycopg.connect(reservation_database.service_url, application_name="box-office") as holder:
        holder.execute(f"{WRITE} -- said 'Ms Secret'")
        found = only(examined(reservation_database, kafka), "writers")
        assert found.level == "warning"
        assert f"pid {holder.info.backend_pid} of reservation_service (box-office)" in found.found
        assert f"pg_terminate_backend({holder.info.backend_pid})" in found.to_do
        assert "pg_read_all_stats" in found.to_do

        # A younger transaction's row shows that the older one is at least as old.
        with psycopg.connect(reservation_database.owner_url) as owner:
            owner.execute(WRITE)
            owner.execute("UPDATE outbox SET created_at = now() - interval '2 minutes'")
        found = only(examined(reservation_database, kafka), "writers")
        assert found.level == "error"
        assert "at least 12" in found.found
    assert only(examined(reservation_database, kafka), "writers").level == "ok"


def test_a_transaction_without_rows_in_the_outbox_holds_nothing_back(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with (
        psycopg.connect(reservation_database.owner_url) as reader,
        psycopg.connect(reservation_database.owner_url) as writer,
    ):
        reader.execute("SELECT FROM outbox")
        writer.execute("UPDATE outbox_topics SET max_bytes = max_bytes")
        assert only(examined(reservation_database, kafka), "writers").level == "ok"


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("COMMIT", "COMMIT"),
        ("INSERT INTO t VALUES ('Ms Secret', 5)", "INSERT INTO t VALUES (…"),
        ("SELECT $1, t2.a FROM t2 WHERE id = 4711", "SELECT $1, t2.a FROM t2 WHERE id =…"),
        ("DO $$ secret $$", "DO…"),
        ("SELECT\n  " + "x, " * 100, "SELECT " + "x, " * 24 + "x…"),
    ],
)
def test_a_query_is_shown_up_to_its_first_literal(query: str, shown: str) -> None:
    assert doctor._shown(query) == shown


def test_rows_of_another_server_s_future_are_counted(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with psycopg.connect(reservation_database.owner_url) as owner:
        owner.execute(WRITE)
        owner.execute(WRITE)
        owner.execute("UPDATE outbox SET transaction_id = '4000000000' WHERE id = 2")
    found = only(examined(reservation_database, kafka), "restored rows")
    assert (found.level, found.found[:17]) == ("error", "1 rows from id 2 ")
    with psycopg.connect(reservation_database.owner_url) as owner:  # what it says to do
        owner.execute(found.to_do.split(": ", 1)[1].split(";", maxsplit=1)[0])
    assert only(examined(reservation_database, kafka), "restored rows").level == "ok"


def test_cached_ids_and_an_old_schema_are_errors(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with psycopg.connect(reservation_database.owner_url) as owner:
        owner.execute("ALTER TABLE outbox ALTER COLUMN id SET CACHE 20")
        owner.execute("UPDATE alembic_version SET version_num = 'reservations_0000'")
    found = examined(reservation_database, kafka)
    assert "CACHE 20" in only(found, "outbox ids").found
    assert "reservation-service migrate" in only(found, "migrations").to_do
    assert doctor.failed(found)


def test_the_doctor_knows_the_newest_migration() -> None:
    assert migrations.head("reservations") == doctor.NEWEST_REVISION


def test_rows_in_the_default_partition_are_an_error(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with psycopg.connect(reservation_database.owner_url) as owner:
        owner.execute(
            "INSERT INTO outbox (id, topic, key, payload) OVERRIDING SYSTEM VALUE"
            " VALUES (900000000000, 'concert-reservation', 'k', '{}')"
        )
    found = only(examined(reservation_database, kafka), "default partition")
    assert found.level == "error"
    assert found.found == "holds 1 rows from id 900000000000 on: beyond all ranges"


def test_the_session_that_writes_into_a_partition_itself_is_named_too(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    with psycopg.connect(reservation_database.owner_url) as holder:
        holder.execute(
            "INSERT INTO outbox_default (id, topic, key, payload) OVERRIDING SYSTEM VALUE"
            " VALUES (900000000000, 'concert-reservation', 'k', '{}')"
        )
        found = only(examined(reservation_database, kafka), "writers")
        assert f"pid {holder.info.backend_pid}" in found.found


def test_quarantined_and_unpublished_events_are_told(outbox: Outbox, kafka: KafkaCluster) -> None:
    outbox.insert("k", "{}")
    with outbox.owner() as owner:
        owner.execute("UPDATE outbox SET created_at = now() - interval '90 seconds'")
        owner.execute(
            "INSERT INTO outbox_relay_quarantine (relay_name, id, topic, key, payload, headers,"
            " error) VALUES ('r', 7, 't', 'k', '{}', '{}', 'too large'),"
            " ('r', 9, 't', 'k', '{}', '{}', NULL), ('other', 8, 't', 'k', '{}', '{}', 'x')"
        )
    found = examined(outbox.database, kafka)
    assert only(found, "quarantined events").found.startswith("2 of t, 1 of them refused")
    unpublished = only(found, "unpublished events")
    assert unpublished.level == "error"
    assert f"an event of {outbox.topic} has waited for 9" in unpublished.found


def test_what_is_published_does_not_count_as_waiting(outbox: Outbox, kafka: KafkaCluster) -> None:
    """Of a batch under way only what lies behind `batch_last_id` waits."""
    for _ in range(3):
        outbox.insert("k", "{}")
    with outbox.owner() as owner:
        owner.execute("UPDATE outbox SET created_at = now() - interval '700 s' WHERE id < 3")
        owner.execute("UPDATE outbox SET created_at = now() - interval '90 s' WHERE id = 3")
        owner.execute(
            "INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,"
            " published_snapshot, batch_snapshot, batch_last_id, system_identifier, database_oid,"
            " timeline, wal_lsn) VALUES ('r', %s, 'exactly_once', 1, '', '3:3:',"
            " pg_current_snapshot(), 2, 1, 1, '1', '0/0')",
            [outbox.topic],
        )
        assert (
            "has waited for 9" in only(examined(outbox.database, kafka), "unpublished events").found
        )
        owner.execute(
            "UPDATE outbox_relay_cursor SET published_snapshot = batch_snapshot,"
            " batch_snapshot = NULL, batch_last_id = NULL"
        )
        assert only(examined(outbox.database, kafka), "leader").level == "warning"
        assert named(examined(outbox.database, kafka), "unpublished events") == []


STRANGE_CURSOR = """
INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,
    published_snapshot, system_identifier, database_oid, timeline, wal_lsn, updated_at)
SELECT %s, %s, 'exactly_once', 1, '', '3:3:', system_identifier + %s,
    (SELECT oid FROM pg_database WHERE datname = current_database()),
    left(pg_walfile_name(pg_current_wal_lsn()), 8), '0/0', now() - make_interval(secs => %s)
FROM pg_control_system()
"""


def test_cursors_that_hold_retention_up_for_nobody_are_named(
    outbox: Outbox, kafka: KafkaCluster
) -> None:
    outbox.insert("k", "{}")
    with outbox.owner() as owner:
        for relay, topic, idle_s in (("r", outbox.topic, 900), ("r", "gone", 700)):
            owner.execute(STRANGE_CURSOR, (relay, topic, 0, idle_s))
        owner.execute(STRANGE_CURSOR, ("busy", outbox.topic, 0, 1))
        owner.execute(STRANGE_CURSOR, ("dead", outbox.topic, 0, 800))
    found = named(examined(outbox.database, kafka), "abandoned cursors")
    dead, gone = found
    assert dead.found.startswith(f"relay dead, topic {outbox.topic}: not moved for 80")
    assert gone.found.startswith("relay r, topic gone: not moved for 70")
    with outbox.owner() as owner:  # what it says to do
        for finding in found:
            owner.execute(finding.to_do[finding.to_do.index("DELETE") :])
        owner.execute("INSERT INTO outbox_topics VALUES ('new', 1000)")
    (missing,) = named(examined(outbox.database, kafka), "abandoned cursors")
    assert missing.found.startswith("relay busy, topic new: no cursor")


def test_a_topic_whose_lane_refuses_is_named_with_the_reason(
    outbox: Outbox, kafka: KafkaCluster
) -> None:
    with outbox.owner() as owner:
        owner.execute(STRANGE_CURSOR, ("r", outbox.topic, 1, 0))
    refused = only(examined(outbox.database, kafka), "refused topics")
    assert (refused.level, "another server" in refused.found) == ("error", True)
    assert "outbox-relay resume --from-id N" in refused.to_do
    with outbox.owner() as owner:  # as a move to this Kafka without `resume`
        owner.execute("DELETE FROM outbox_relay_cursor")
        owner.execute(STRANGE_CURSOR, ("r", outbox.topic, 0, 0))
        owner.execute("UPDATE outbox_relay_cursor SET kafka_cluster_id = 'another'")
    assert only(examined(outbox.database, kafka), "refused topics").level == "ok"
    kafka.create_topic("outbox-relay-cursor.r", 1)
    refused = named(examined(outbox.database, kafka), "refused topics")[-1]
    assert "another Kafka cluster" in refused.found


def test_a_relay_that_stands_by_without_kafka_is_named(
    reservation_database: ReservationDatabase,
    kafka: KafkaCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sql, "STANDBYS", sql.STANDBYS.replace("'10 s'", "'0 s'"))
    with leadership.connect(reservation_database.relay_url, "standby") as connection:
        unfit = only(examined(reservation_database, kafka), "standby")
        assert (unfit.level, "does not reach Kafka" in unfit.found) == ("warning", True)
        leadership.Standby(connection, "r").tell(fit=True)
        assert only(examined(reservation_database, kafka), "standby").level == "ok"


def test_commits_that_a_crash_may_take_back_are_found_for_each_writer(
    reservation_database: ReservationDatabase, kafka: KafkaCluster
) -> None:
    name = reservation_database.name
    with psycopg.connect(reservation_database.owner_url, autocommit=True) as owner:
        owner.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
        found = named(examined(reservation_database, kafka), "synchronous_commit")
        roles = [one.found.split(":")[0] for one in found if one.level == "error"]
        # Other tests' roles belong to the same server.
        assert {"off for reservation_owner", "off for reservation_service"} <= set(roles)
        # As `ALTER ROLE … IN DATABASE …`, which comes before the database's own.
        owner.execute(
            f'ALTER ROLE reservation_service IN DATABASE "{name}" SET synchronous_commit = on'
        )
        found = named(examined(reservation_database, kafka), "synchronous_commit")
        roles = [one.found.split(":")[0] for one in found]
        assert "off for reservation_owner" in roles
        assert "off for reservation_service" not in roles


def test_a_clock_that_differs_is_told(
    reservation_database: ReservationDatabase,
    kafka: KafkaCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = time.time
    monkeypatch.setattr("outbox_relay.doctor.time.time", lambda: real() + 5.5)
    found = only(examined(reservation_database, kafka), "clock")
    assert "differ by 5.5 s" in found.found


def test_a_badly_kept_server_is_told_in_all_its_parts(
    make_postgres_server: MakePostgresServer, kafka: KafkaCluster
) -> None:
    server = make_postgres_server(
        {
            "max_prepared_transactions": "2",
            "max_connections": "12",
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
        }
    )
    database = create_reservation_database(server)
    with psycopg.connect(database.service_url) as holder:
        holder.execute(WRITE)
        holder.execute("SAVEPOINT s")
        holder.execute(WRITE)
        holder.execute("PREPARE TRANSACTION 'it''s'")
        holder.commit()
    with psycopg.connect(server.admin_url) as admin:
        admin.execute("GRANT pg_read_all_stats TO outbox_relay")
    with closing(psycopg.connect(database.service_url)) as holder:
        holder.execute(f"{WRITE} -- said 'Ms Secret'")
        found = examined(database, kafka)
    prepared, session = sorted(named(found, "writers"), key=lambda one: "session" in one.found)
    assert "prepared transaction it''s of reservation_service" in prepared.found
    assert "ROLLBACK PREPARED 'it''s'" in prepared.to_do
    assert "idle in transaction" in session.found
    assert "INSERT INTO outbox (topic, key, payload) VALUES (…" in session.found
    off = "is off: a crash may lose bookings"
    assert [one.found for one in named(found, "server")] == [
        f"fsync {off}",
        f"full_page_writes {off}",
    ]
    assert {one.level for one in named(found, "synchronous_commit")} == {"error"}
    assert only(found, "connections").level == "warning"

    server.stop()
    (server.data_folder / "standby.signal").touch()
    server.start()
    assert named(examined(database, kafka), "server")[0].found.startswith("a standby")

    server.pause()
    began_s = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = doctor.examine_all(
            settings(database.relay_url, f"127.0.0.1:{silent.getsockname()[1]}")
        )
    assert time.monotonic() - began_s < 15
    assert [(one.level, one.name) for one in found] == [("error", "postgres"), ("error", "kafka")]
    server.resume()


def test_an_examination_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = Event()

    def hanging() -> Iterator[Finding]:
        yield Finding("ok", "first", "fine")
        released.wait()

    monkeypatch.setattr(doctor, "PART_TIMEOUT_S", 0.2)
    found = doctor._within_time("postgres", hanging())
    released.set()
    assert [(one.level, one.name) for one in found] == [("ok", "first"), ("error", "postgres")]


def test_a_fault_of_the_doctor_itself_is_not_swallowed() -> None:
    def faulty() -> Iterator[Finding]:
        yield Finding("ok", "first", "fine")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        doctor._within_time("postgres", faulty())


def test_a_line_a_finding_whatever_others_call_themselves() -> None:
    text = doctor.render(
        [
            Finding("ok", "kafka", "3 brokers"),
            Finding("error", "writers", "of \x1b[31mred\n tape", "end it"),
        ]
    )
    assert text.splitlines() == [
        "ok      kafka: 3 brokers",
        "error   writers: of ?[31mred tape -> end it",
    ]


def test_unsafe_topics_and_missing_replicas_are_told(
    reservation_database: ReservationDatabase, make_kafka_cluster: MakeKafkaCluster
) -> None:
    cluster = make_kafka_cluster(brokers=3)
    properties = {"bootstrap.servers": cluster.bootstrap_servers}
    with psycopg.connect(reservation_database.owner_url) as owner:
        owner.execute("INSERT INTO outbox_topics VALUES ('others', 900000)")

    def of_kafka() -> dict[str, str]:
        lines: dict[str, str] = {}
        for one in examined(reservation_database, cluster):
            if one.name.startswith(("topic", "kafka", "__")):
                lines[one.name] = f"{lines.get(one.name, '')}{one.level} {one.found}; {one.to_do}\n"
        return lines

    found = of_kafka()
    assert found["topic concert-reservation"] == "error is missing; outbox-relay topics\n"
    assert "error is missing; make it" in found["topic others"]
    assert "__transaction_state" not in found

    topics.make_or_check(properties, "outbox-relay-cursor.r", None)
    cluster.create_topic("others", 1, {"max.message.bytes": "1048588"})
    Producer({**properties, "transactional.id": "t", "log_level": 0}).init_transactions(30)
    assert of_kafka() == {
        "kafka": "ok brokers: 3; \n",
        "topic concert-catalogue": "ok fine; \n",
        "topic concert-reservation": "ok fine; \n",
        "topic others": "ok fine; \n",
        "topic outbox-relay-cursor.r": "ok fine; \n",
        "topic __transaction_state": "ok fine; \n",
    }

    def told(expected: dict[str, str]) -> bool:
        found = of_kafka()
        return all(text in found[name] for name, text in expected.items())

    cluster.set_topic_config("concert-catalogue", {"unclean.leader.election.enable": "true"})
    cluster.set_topic_config("outbox-relay-cursor.r", {"min.insync.replicas": "1"})
    cluster.set_topic_config("__transaction_state", {"min.insync.replicas": "1"})
    cluster.set_topic_config("others", {"max.message.bytes": "2000"})
    cluster.set_topic_config("concert-reservation", {"min.insync.replicas": "3"})
    unsafe = {  # as soon as each broker has heard of it
        "topic concert-catalogue": "error unclean.leader.election.enable is true, wanted false",
        "topic outbox-relay-cursor.r": "error min.insync.replicas is 1, wanted 2",
        "topic __transaction_state": "error min.insync.replicas is 1, wanted 2",
        "topic others": "max.message.bytes is 2000, while outbox_topics allows 900000",
        "topic concert-reservation": "error min.insync.replicas is 3, wanted 2",
    }
    wait_until(lambda: told(unsafe), 30, "what is unsafe to be told")

    cluster.brokers[2].kill()
    fewer = unsafe | {
        "kafka": f"warning of 3 brokers these are down: [{cluster.brokers[2].node_id}]",
        "topic concert-reservation": "have fewer than 3 in-sync replicas or no leader",
    }
    wait_until(lambda: told(fewer), 30, "the missing broker to be told")
    assert "warning partitions [0, 1, 2]" in of_kafka()["topic concert-catalogue"]
