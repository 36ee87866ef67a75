"""The relay when Postgres or Kafka fails, and when its database is not the one it knew."""

import json
import subprocess
import sys
from dataclasses import replace

import psycopg
import pytest
from confluent_kafka import Producer

from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from outbox_relay import __main__, exactly_once, sql
from tests.conftest import MakeKafkaCluster, MakePostgresServer
from tests.databases import create_reservation_database
from tests.outbox_relay.conftest import Outbox, StartRelay
from tests.proxy import BreakableKafka, kafka_requests
from tests.waiting import wait_until

FETCH = 1


def is_fetch(piece: bytes) -> bool:
    """Whether a Fetch is among the requests."""
    return FETCH in kafka_requests(piece)


def command(outbox: Outbox, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outbox_relay", *arguments],
        env=outbox.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def private_outbox(
    make_postgres_server: MakePostgresServer, outbox: Outbox
) -> tuple[PostgresServer, Outbox]:
    """An outbox on a server that the test may crash."""
    server = make_postgres_server()
    database = create_reservation_database(server)
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("DELETE FROM outbox_topics")
        connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000000)", (outbox.topic,))
    return server, replace(outbox, database=database)


def test_the_relay_outlives_a_crash_of_postgres_and_says_so_once(
    private_outbox: tuple[PostgresServer, Outbox], start_relay: StartRelay
) -> None:
    server, outbox = private_outbox
    outbox.insert("a", "1")
    relay = start_relay(outbox)
    wait_until(outbox.records, 20, "the first row")
    server.kill()
    wait_until(lambda: "waiting" in relay.log.read_text(), 20, "the outage to be said")
    server.start()
    outbox.insert("a", "2")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 30, "the second row")
    assert relay.alive
    # At least once: the crash may have come between acknowledgement and cursor.
    assert list(dict.fromkeys(r.value for r in outbox.records())) == [b"1", b"2"]
    assert relay.log.read_text().count('"waiting"') <= 2


def test_sigterm_ends_a_relay_whose_postgres_is_frozen_within_ten_seconds(
    private_outbox: tuple[PostgresServer, Outbox], start_relay: StartRelay
) -> None:
    server, outbox = private_outbox
    outbox.insert("a", "1")
    relay = start_relay(outbox)
    wait_until(outbox.records, 20, "the first row")
    server.pause()
    try:
        assert relay.stop(timeout_s=10) == 0
    finally:
        server.resume()
    for line in relay.log.read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_the_relay_waits_for_kafka_and_publishes_everything_when_it_is_back(
    outbox: Outbox, start_relay: StartRelay, make_kafka_cluster: MakeKafkaCluster
) -> None:
    cluster = make_kafka_cluster(brokers=1)
    cluster.create_topic(outbox.topic, 3)
    outbox = replace(outbox, bootstrap_servers=cluster.bootstrap_servers)
    relay = start_relay(outbox)
    outbox.insert("a", "0")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "the first row")
    (broker,) = cluster.brokers
    broker.kill()
    outbox.insert_many(500)
    assert relay.alive
    broker.start()
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 60, "the backlog")
    assert relay.alive
    assert len({r.value for r in outbox.records()}) == 501


def test_a_missing_topic_is_waited_for(
    outbox: Outbox, start_relay: StartRelay, kafka: KafkaCluster
) -> None:
    later = f"{outbox.topic}-later"
    with outbox.owner() as connection:
        connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000000)", (later,))
    waiting = replace(outbox, topic=later)
    waiting.insert("a", "1")
    relay = start_relay(waiting)
    wait_until(lambda: "leading" in relay.log.read_text(), 20, "the relay to lead")
    kafka.create_topic(later, 1)
    wait_until(lambda: waiting.status()["lag_rows"] == 0, 60, "the row")
    assert [r.value for r in waiting.records()] == [b"1"]


def terms_begun(outbox: Outbox) -> int:
    with outbox.owner() as connection:
        found = connection.execute("SELECT leader_epoch FROM outbox_relay_cursor").fetchone()
    return 0 if found is None else int(found[0])


def test_a_relay_that_may_not_read_backs_off_and_says_so_once(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    with outbox.owner() as connection:
        connection.execute("REVOKE SELECT ON outbox FROM outbox_relay")
        relay = start_relay(outbox)
        wait_until(lambda: terms_begun(outbox) >= 6, 60, "some attempts")
        assert len(relay.log.read_text().splitlines()) <= 2
        connection.execute("GRANT SELECT ON outbox TO outbox_relay")
    outbox.insert("a", "1")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 30, "the row")


def test_a_standby_is_refused_and_a_promoted_server_needs_resume(
    private_outbox: tuple[PostgresServer, Outbox], start_relay: StartRelay
) -> None:
    server, outbox = private_outbox
    for number in (1, 2, 3):
        outbox.insert("a", str(number))
    relay = start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0 and outbox.records(), 20, "all rows")
    relay.stop()

    server.stop()
    (server.data_folder / "standby.signal").touch()
    server.start()
    refused = command(outbox, "run")
    assert refused.returncode == 1
    assert "leads to a standby" in refused.stderr

    with psycopg.connect(server.admin_url, autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")
        wait_until(
            lambda: connection.execute("SELECT NOT pg_is_in_recovery()").fetchone() == (True,),
            20,
            "the promotion",
        )
    refused = command(outbox, "run")
    assert refused.returncode == 1
    assert "timeline" in refused.stderr
    assert "outbox-relay resume --from-id N" in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("outbox-relay: the cursor was written")

    with outbox.owner() as connection:
        found = connection.execute("SELECT max(id) FROM outbox").fetchone()
    assert found is not None
    dry = command(outbox, "resume", "--from-id", str(found[0]))
    assert (dry.returncode, "nothing changed" in dry.stdout) == (0, True)
    assert command(outbox, "run").returncode == 1
    done = command(outbox, "resume", "--from-id", str(found[0]), "--apply")
    assert "publish 1 committed rows" in done.stdout
    assert "skip 2" in done.stdout
    outbox.insert("a", "4")
    start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "what is new")
    assert [r.value for r in outbox.records()] == [b"1", b"2", b"3", b"3", b"4"]


def test_resume_refuses_while_a_relay_leads(outbox: Outbox, start_relay: StartRelay) -> None:
    relay = start_relay(outbox)
    wait_until(lambda: "leading" in relay.log.read_text(), 20, "the relay to lead")
    refused = command(outbox, "resume", "--from-id", "1", "--apply")
    assert refused.returncode == 1
    assert "is running" in refused.stderr


def test_resume_beyond_the_newest_row_warns(outbox: Outbox, start_relay: StartRelay) -> None:
    outbox.insert("a", "1")
    relay = start_relay(outbox)
    wait_until(outbox.records, 20, "the row")
    assert relay.stop() == 0
    warned = command(outbox, "resume", "--from-id", "1000")
    assert (warned.returncode, "the newest row is 1" in warned.stderr) == (0, True)
    assert command(outbox, "resume", "--from-id", "1").stderr == ""


def test_resume_says_in_one_line_that_kafka_fails_in_its_midst(
    outbox: Outbox,
    breakable_kafka: BreakableKafka,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cursor_topic = f"outbox-relay-cursor.{outbox.relay_name}"
    breakable_kafka.cluster.create_topic(cursor_topic, 1)
    producer = Producer({"bootstrap.servers": breakable_kafka.cluster.bootstrap_servers})
    producer.produce(cursor_topic, b"{}", b"another topic")
    assert producer.flush(20) == 0
    behind_it = replace(outbox, bootstrap_servers=breakable_kafka.bootstrap_servers)
    for name, value in behind_it.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["outbox-relay", "resume", "--from-id", "1"])
    monkeypatch.setattr(exactly_once, "OPEN_WITHIN_S", 2.0)
    (proxy,) = breakable_kafka.proxies
    proxy.freeze_at(is_fetch, after=False)
    try:
        with pytest.raises(SystemExit) as ended:
            __main__.main()
    finally:
        proxy.open()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "outbox-relay: the end of the cursor topic was not reached in time\n"
    )


def test_an_empty_outbox_has_nothing_to_prune_and_says_so(outbox: Outbox) -> None:
    assert "nothing to let go of" in command(outbox, "prune").stdout


def test_a_backlog_that_takes_too_long_to_count_is_told_as_far_as_it_was(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.insert("a", "1")
    exact = outbox.status()
    monkeypatch.setattr(
        sql, "LAG", sql.LAG.replace("WHERE", "WHERE pg_sleep(5) IS NOT NULL AND", 1)
    )
    options = sql.SESSION_OPTIONS.replace("statement_timeout=30s", "statement_timeout=500ms")
    monkeypatch.setattr(sql, "SESSION_OPTIONS", options)
    bounded = outbox.status()
    assert (exact["lag_rows"], exact["oldest_id"]) == (1, 1)
    assert (bounded["lag_rows"], bounded["oldest_id"]) == (1, None)
    assert bounded["lag_seconds"] >= exact["lag_seconds"]


def test_cached_ids_are_refused_because_they_reorder_events(outbox: Outbox) -> None:
    with outbox.owner() as connection:
        connection.execute("ALTER TABLE outbox ALTER COLUMN id SET CACHE 20")
    refused = command(outbox, "run")
    assert refused.returncode == 1
    assert "CACHE 20" in refused.stderr
