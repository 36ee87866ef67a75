"""The rows that are measured are the service's own."""

import json
from pathlib import Path

import jsonschema
import psycopg

from benchmarks import events
from tests.databases import ReservationDatabase

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "contracts" / "reservation-event.schema.json").read_text("utf-8")
)
ROWS = """
SELECT key, payload::text, headers::text, payload->>'id' FROM outbox ORDER BY id
"""


def test_a_backlog_holds_events_as_the_contract_has_them_each_reservation_in_order(
    reservation_database: ReservationDatabase,
) -> None:
    url = reservation_database.owner_url
    events.prepare(url)
    backlog = events.write_backlog(url, 400)
    single = events.write_one(url)
    with psycopg.connect(url) as connection:
        rows = connection.execute(ROWS).fetchall()
    assert (backlog.after_id, backlog.rows, len(rows)) == (0, 400, 401)
    versions: dict[str, list[int]] = {}
    for key, payload, headers, _ in rows:
        jsonschema.validate(json.loads(payload), SCHEMA)
        assert events.TEMPLATE_ID not in payload
        assert events.TEMPLATE_TRACE not in payload + headers
        assert json.loads(payload)["subject"] == key
        versions.setdefault(key, []).append(int(json.loads(payload)["id"].rpartition(":")[2]))
    assert versions.pop(single.decode()) == [1]
    assert set(map(tuple, versions.values())) == {(1, 2)}
