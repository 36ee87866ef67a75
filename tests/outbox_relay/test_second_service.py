"""Another service's events, written as docs/outbox.md says and published by the real relay."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from reservation_service import outbox as writing
from tests.outbox_relay.conftest import Outbox, StartRelay
from tests.waiting import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "outbox.md"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def mailer_url(outbox: Outbox) -> Iterator[str]:
    """A role with the rights of docs/outbox.md, and a table of its own."""
    with psycopg.connect(outbox.database.owner_url, autocommit=True) as owner:
        owner.execute("DELETE FROM outbox_topics")  # the document adds it
        owner.execute(sql_of_document("Once", outbox.topic))
        owner.execute("ALTER ROLE mailer PASSWORD 'of-a-test'")
        owner.execute("CREATE TABLE mails (mail_id bigint PRIMARY KEY, sent_at timestamptz)")
        owner.execute("GRANT SELECT, INSERT, UPDATE ON mails TO mailer")
        owner.execute("INSERT INTO mails VALUES (7)")
        yield re.sub("//[^@]*@", "//mailer:of-a-test@", outbox.database.owner_url)
        owner.execute("DROP TABLE mails")
        owner.execute("REVOKE ALL ON outbox, outbox_topics FROM mailer")
        owner.execute("DROP ROLE mailer")


def sql_of_document(heading: str, topic: str) -> bytes:
    """The statements that docs/outbox.md has below a heading, for the topic of a test."""
    below = DOCUMENT.read_text("utf-8").partition(f"## {heading}")[2]
    statements = below.partition("```sql\n")[2].partition("```")[0]
    return statements.replace("tickets-mailed", topic).encode()


def test_a_second_service_s_events_leave_byte_for_byte_with_insert_rights_alone(
    outbox: Outbox, mailer_url: str, start_relay: StartRelay
) -> None:
    payload = '{"b" : 1,\n "a":"é \\u00e9 서울",  "n": 1.00000000000000000001, "b": 2}'.encode()
    with psycopg.connect(mailer_url, autocommit=True) as connection:
        connection.execute(sql_of_document("In each transaction", outbox.topic))
        with connection.transaction():
            connection.execute("INSERT INTO mails VALUES (8)")
            writing.write(
                connection,
                topic=outbox.topic,
                key="8 서울",
                payload=payload,
                headers={"content-type": "application/json"},
                traceparent=TRACEPARENT,
            )
        with suppress(ZeroDivisionError), connection.transaction():
            connection.execute("INSERT INTO mails VALUES (9)")
            writing.write(connection, topic=outbox.topic, key="9", payload=b"{}")
            raise ZeroDivisionError
        for forbidden in (
            "SELECT * FROM outbox",
            "DELETE FROM outbox",
            "UPDATE outbox SET key = ''",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(forbidden.encode())
    start_relay(outbox)
    wait_until(lambda: len(outbox.records()) == 2, 20, "both events")
    kind = {"content-type": "application/json"}
    assert {record.key: (record.value, record.headers) for record in outbox.records()} == {
        "7": (b'{"mail_id": 7}', kind),
        "8 서울": (payload, kind | {"traceparent": TRACEPARENT}),
    }


def test_the_module_needs_nothing_else_of_ours() -> None:
    source = Path(writing.__file__).read_text("utf-8")
    assert "reservation_service" not in source.partition('"""')[2].partition('"""')[2]
