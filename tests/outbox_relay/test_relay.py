"""The relay as a process, on a real Postgres and a real Kafka."""

import json
import signal
import subprocess
import sys

import httpx
import psycopg

from devstack.state import free_port
from tests.outbox_relay.conftest import Outbox, StartRelay
from tests.waiting import wait_until

BACKLOG_ROWS = 100_000


def status_command(outbox: Outbox) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "outbox_relay", "status", "--json"],
        env=outbox.environment(),
        capture_output=True,
        check=True,
        timeout=30,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_key_payload_and_headers_arrive_as_they_were_written(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    payload = '{"b" : 1,\n "a":"\\u00e9 é \\ud83c",  "n": 1.00000000000000000001, "b": 2}'
    outbox.insert("서울 1", payload, '{"traceparent": "00-ab-cd-01", "content-type": "ü"}')
    start_relay(outbox)
    records = wait_until(outbox.records, 20, "the record")
    assert [(r.key, r.value.decode(), r.headers) for r in records] == [
        ("서울 1", payload, {"traceparent": "00-ab-cd-01", "content-type": "ü"})
    ]


def test_a_key_goes_to_the_partition_where_the_java_client_puts_it(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    # org.apache.kafka.clients.producer.internals.BuiltInPartitioner: murmur2, sign bit off.
    keys = [f"key-{n}" for n in range(50)]
    for key in keys:
        outbox.insert(key, "{}")
    start_relay(outbox)
    wait_until(lambda: len(outbox.records()) == len(keys), 20, "all records")
    expected = {key: (murmur2(key.encode()) & 0x7FFFFFFF) % 3 for key in keys}
    assert {r.key: r.partition for r in outbox.records()} == expected


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 (seed 0x9747b28c), 32 bits."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    value = (0x9747B28C ^ len(data)) & mask
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = (int.from_bytes(data[at : at + 4], "little") * m) & mask
        k = ((k ^ (k >> 24)) * m) & mask
        value = ((value * m) & mask) ^ k
    if rest := data[whole:]:
        value = ((value ^ int.from_bytes(rest, "little")) * m) & mask
    value = ((value ^ (value >> 13)) * m) & mask
    return value ^ (value >> 15)


def test_sigterm_ends_the_relay_with_exit_0_and_nothing_is_published_twice_afterwards(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    outbox.insert_many(2_000)
    first = start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "the backlog to be published")
    assert first.stop() == 0
    outbox.insert("later", "{}")
    start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "the later row")
    assert len(outbox.records()) == 2_001


def test_a_backlog_larger_than_a_chunk_is_published_once_and_in_order(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    outbox.insert_many(12_345)
    start_relay(outbox, {"OUTBOX_RELAY_CHUNK_MAX_ROWS": "1000"})
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 30, "the backlog")
    numbers_by_key: dict[str, list[int]] = {}
    for record in outbox.records():
        numbers_by_key.setdefault(record.key, []).append(json.loads(record.value)["n"])
    assert sum(map(len, numbers_by_key.values())) == 12_345
    assert all(numbers == sorted(numbers) for numbers in numbers_by_key.values())


def test_a_relay_that_restarts_in_the_middle_of_a_batch_goes_on_behind_what_it_stored(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    outbox.insert_many(BACKLOG_ROWS)
    small = {"OUTBOX_RELAY_CHUNK_MAX_ROWS": "100"}
    relay = start_relay(outbox, small)
    wait_until(lambda: published_rows(outbox) >= 500, 20, "a part to be published")
    relay.kill()
    stored = published_rows(outbox)
    assert 500 <= stored < BACKLOG_ROWS
    arrived = len(outbox.records())
    relay = start_relay(outbox, small)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 60, "the rest")
    records = outbox.records()
    # What was sent and not yet stored may come twice, and nothing else.
    assert BACKLOG_ROWS <= len(records) <= arrived + BACKLOG_ROWS - stored
    assert {json.loads(r.value)["n"] for r in records} == set(range(1, BACKLOG_ROWS + 1))


def published_rows(outbox: Outbox) -> int:
    with outbox.owner() as connection:
        found = connection.execute(
            "SELECT published_rows FROM outbox_relay_cursor WHERE relay_name = %s",
            (outbox.relay_name,),
        ).fetchone()
    return 0 if found is None else int(found[0])


def test_of_two_relays_one_leads_and_the_other_takes_over_when_it_is_killed(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    first = start_relay(outbox)
    outbox.insert("a", "1")
    wait_until(lambda: len(outbox.records()) == 1, 20, "the first row")
    second = start_relay(outbox)
    wait_until(lambda: "standing by" in second.log.read_text(), 20, "the second to stand by")
    first.kill()
    outbox.insert("a", "2")
    wait_until(lambda: len(outbox.records()) == 2, 20, "the second to publish")
    wait_until(lambda: '"leading"' in second.log.read_text(), 20, "it to say so")


def test_a_stopped_leader_loses_its_lock_and_changes_nothing_when_it_wakes_up(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    first = start_relay(outbox)
    outbox.insert("a", "1")
    wait_until(lambda: outbox.status()["lag_rows"] == 0 and outbox.records(), 20, "the first row")
    first.pause()
    start_relay(outbox)
    outbox.insert("a", "2")
    # idle_session_timeout ends the session of a process that does not run.
    wait_until(lambda: len(outbox.records()) == 2, 30, "the second relay to take over")
    first.resume()
    outbox.insert("a", "3")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "the third row")
    wait_until(lambda: "standing by" in first.log.read_text(), 20, "the first to stand by")
    assert [r.value for r in outbox.records()] == [b"1", b"2", b"3"]


def test_rows_written_while_the_relay_is_down_and_of_a_rollback_are_told_apart(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    with psycopg.connect(outbox.database.service_url) as connection:
        for kept in (True, False, True):
            connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES (%s, 'k', %s)",
                (outbox.topic, json.dumps(kept)),
            )
            if kept:
                connection.commit()
            else:
                connection.rollback()
    start_relay(outbox)
    wait_until(lambda: len(outbox.records()) >= 2, 20, "both committed rows")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "no lag")
    assert [r.value for r in outbox.records()] == [b"true", b"true"]


def test_status_tells_leader_lag_and_cursor(outbox: Outbox, start_relay: StartRelay) -> None:
    outbox.insert("a", "1")
    before = status_command(outbox)
    assert before["lag_rows"] == 1
    assert before["leader"] is None
    assert before["cursor"] is None
    assert set(before) >= {"name", "delivery", "leader", "lag_rows", "lag_seconds", "quarantined"}
    relay = start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "no lag")
    assert str(status_command(outbox)["leader"]).endswith(f":{relay.pid}")
    relay.stop()
    assert status_command(outbox)["leader"] is None


def test_log_lines_are_json_and_hold_no_password(outbox: Outbox, start_relay: StartRelay) -> None:
    relay = start_relay(outbox)
    wait_until(lambda: "leading" in relay.log.read_text(), 20, "the relay to lead")
    relay.stop()
    text = relay.log.read_text()
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert events[:2] == ["started", "leading"]
    assert events[-1] == "stopped leading"
    password = psycopg.conninfo.conninfo_to_dict(outbox.database.relay_url)["password"]
    assert str(password) not in text


def test_sigterm_while_kafka_is_away_still_ends_within_ten_seconds(
    outbox: Outbox, start_relay: StartRelay
) -> None:
    outbox.insert("a", "1")
    relay = start_relay(outbox, {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})
    wait_until(lambda: "PublishError" in relay.log.read_text(), 30, "the outage to be said")
    assert relay.stop(timeout_s=10, how=signal.SIGTERM) == 0
    assert relay.log.read_text().count("PublishError") == 1


def test_metrics_and_health_are_served(outbox: Outbox, start_relay: StartRelay) -> None:
    port = free_port()
    start_relay(outbox, {"METRICS_PORT": str(port)})
    outbox.insert("a", "1")
    wait_until(lambda: outbox.status()["lag_rows"] == 0 and outbox.records(), 20, "the row")
    base = f"http://127.0.0.1:{port}"
    counted = f'outbox_relay_published_events_total{{topic="{outbox.topic}"}} 1.0'
    assert "outbox_relay_leader 1.0" in httpx.get(f"{base}/metrics").text
    wait_until(
        lambda: counted in httpx.get(f"{base}/metrics").text,
        10,
        "the counter",
    )
    # The housekeeping has come round.
    wait_until(
        lambda: "outbox_relay_outbox_partitions 0.0" not in httpx.get(f"{base}/metrics").text,
        20,
        "the partitions to be counted",
    )
    assert httpx.get(f"{base}/healthz").status_code == 200
