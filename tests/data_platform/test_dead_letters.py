"""A bad record is put aside byte for byte; everything around it is loaded."""

import base64
import json
from typing import Any

from tests.data_platform.conftest import Platform
from tests.data_platform.foreign_producer import produce_with_header
from tests.data_platform.histories import event, expected_facts, expected_states, history
from tests.data_platform.test_events import BAD_VALUES
from tests.waiting import wait_until


def test_bad_records_are_put_aside_byte_for_byte_and_all_else_is_loaded(
    platform: Platform,
) -> None:
    good = history(300, seed=5)
    bad: list[tuple[bytes | None, bytes | None, str]] = [
        (b"r-1", value, reason) for value, reason in BAD_VALUES
    ] + [
        (None, event("r-1").value, "key"),
        (b"", event("r-1").value, "key"),
        (b"r-2", event("r-1").value, "key"),
        (b"\xff\x00", event("r-1").value, "key"),
        (None, None, "null-value"),
        (b"", b"", "not-json"),
        (None, b"\x00" * 900_000, "not-json"),
    ]
    headers: list[tuple[str, str | bytes | None]] = [("a", b"\x00\xff"), ("b", None), ("a", b"")]
    for number, (key, value, _) in enumerate(bad):
        platform.produce(good[number * 10 : number * 10 + 10])
        platform.produce_raw([(key, value)], partition=3, headers=headers)
    platform.produce(good[len(bad) * 10 :])
    platform.worker()
    platform.wait_for_offsets(len(good) + len(bad))

    stored_headers = [["a", "AP8="], ["b", None], ["a", ""]]
    assert platform.dead_letters() == [
        (key, value, stored_headers, reason) for key, value, reason in bad
    ]
    assert platform.facts() == expected_facts(good)
    assert platform.states() == expected_states(good)
    assert platform.status()["dead_letters"] == len(bad)


def test_a_header_name_that_is_not_utf_8_keeps_nothing_from_being_loaded_or_put_aside(
    platform: Platform,
) -> None:
    platform.execute(
        "ALTER TABLE analytics.fct_reservations"
        " ADD CONSTRAINT nobody_called_x CHECK (customer_id <> 'x')"
    )
    good, refused, last = event(), event(customer_id="x"), event()
    for key, value in ((b"k", b"bad"), (good.key, good.value), (refused.key, refused.value)):
        produce_with_header(platform.bootstrap_servers, platform.topic, key, value, b"\xff\xfe")
    worker = platform.worker()
    platform.produce([last])
    platform.wait_for_offsets(4)

    assert worker.alive
    assert platform.facts() == expected_facts([good, last])
    assert platform.dead_letters() == [
        (b"k", b"bad", [], "not-json"),
        (refused.key, refused.value, [], "refused"),
    ]
    for (error,) in platform.rows("SELECT error FROM analytics.dead_letters"):
        assert error.startswith("headers unreadable: 'utf-8' codec can't decode")


def test_a_topic_of_nothing_but_bad_records_is_put_aside_whole(platform: Platform) -> None:
    platform.produce_raw(((b"k", b"bad %d" % number) for number in range(300)), partition=0)
    platform.worker()
    platform.wait_for_offsets(300)
    assert [value for _, value, _, _ in platform.dead_letters()] == [
        b"bad %d" % number for number in range(300)
    ]


def test_what_only_postgres_refuses_is_found_by_bisection(platform: Platform) -> None:
    platform.execute(
        "ALTER TABLE analytics.fct_reservations"
        " ADD CONSTRAINT nobody_called_x CHECK (customer_id <> 'x')"
    )
    good = history(200, seed=6)
    refused = [event(customer_id="x") for _ in range(70)]
    platform.produce([*good[:100], *refused[:30], *good[100:], *refused[30:]])
    platform.worker()
    platform.wait_for_offsets(len(good) + len(refused))

    assert platform.facts() == expected_facts(good)
    assert platform.states() == expected_states(good)
    assert sorted((key, value) for key, value, _, _ in platform.dead_letters()) == sorted(
        (one.key, one.value) for one in refused
    )
    assert {reason for _, _, _, reason in platform.dead_letters()} == {"refused"}
    # What Postgres quotes of the row is kept, and not listed.
    kept = platform.rows("SELECT count(*) FROM analytics.dead_letters WHERE error LIKE '%DETAIL%'")
    assert kept == [(len(refused),)]
    for form in ([], ["--json"]):
        listed = platform.command("dead-letters", "list", *form).stdout
        assert "nobody_called_x" in listed
        assert "DETAIL" not in listed


def test_when_postgres_refuses_most_records_the_worker_stops_and_puts_nothing_aside(
    platform: Platform,
) -> None:
    platform.execute(
        "ALTER TABLE analytics.fct_reservations ADD CONSTRAINT our_fault CHECK (amount < 0)"
    )
    events = history(200, seed=8)
    # Into one partition: they come as one batch. (Less than a hundred could be bad records.)
    platform.produce_raw([(one.key, one.value) for one in events], partition=0)
    worker = platform.worker()
    wait_until(lambda: "MostlyRefusedError" in worker.log.read_text(), 30, "the worker to say so")
    assert platform.dead_letters() == []

    platform.execute("ALTER TABLE analytics.fct_reservations DROP CONSTRAINT our_fault")
    platform.wait_for_offsets(len(events))
    assert worker.alive
    assert platform.facts() == expected_facts(events)
    assert platform.dead_letters() == []


def test_dead_letters_can_be_listed_and_shown(platform: Platform) -> None:
    platform.produce_raw([(None, b"\x00bad"), (b"r-1", None)], partition=2)
    platform.worker()
    platform.wait_for_offsets(2)

    listed = [
        json.loads(line)
        for line in platform.command("dead-letters", "list", "--json").stdout.splitlines()
    ]
    assert [(one["kafka_offset"], one["reason"]) for one in listed] == [
        (0, "not-json"),
        (1, "null-value"),
    ]
    (line,) = platform.command(
        "dead-letters", "list", "--reason", "null-value", "--topic", platform.topic
    ).stdout.splitlines()
    assert line.startswith(f"{platform.topic} 2 1  ")
    assert line.endswith("null-value: the record has no value")
    assert platform.command("dead-letters", "list", "--topic", "other").stdout == ""
    shown: dict[str, Any] = json.loads(
        platform.command("dead-letters", "show", platform.topic, "2", "0").stdout
    )
    assert shown["raw_key"] is None
    assert base64.b64decode(shown["raw_value"]) == b"\x00bad"
    missing = platform.command("dead-letters", "show", platform.topic, "2", "2")
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1
