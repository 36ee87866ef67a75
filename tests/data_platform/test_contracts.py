"""contracts/ says what the live schema and the real events are, in documents that are valid."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import jsonschema
import psycopg
import pytest
import yaml
from jsonschema import Draft202012Validator

from benchmarks import events
from contracts.__main__ import HERE, documents
from reservation_service.events import Concert, Performance, Section, write_concert
from tests.databases import AnalyticsDatabase

if TYPE_CHECKING:
    from reservation_service.database import Connection


def committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((HERE / name).read_text("utf-8"))
    return found


def test_the_committed_files_are_what_the_live_schema_and_the_topics_give(
    analytics_database: AnalyticsDatabase,
) -> None:
    for name, text in documents(analytics_database.owner_url).items():
        assert (HERE / name).read_text("utf-8") == text, f"{name}: run `python -m contracts`"


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE analytics.dim_concerts ADD COLUMN genre text",
        "ALTER TABLE analytics.fct_reservations ALTER COLUMN amount TYPE numeric",
        "ALTER TABLE analytics.dim_concerts ALTER COLUMN currency SET NOT NULL",
        "COMMENT ON COLUMN analytics.freshness.topic IS 'Something else.'",
        "REVOKE SELECT ON analytics.dim_concerts FROM analyst",
        "GRANT SELECT ON analytics.load_offsets TO analyst",
    ],
)
def test_a_change_of_the_live_schema_makes_the_contract_stale(
    analytics_database: AnalyticsDatabase, change: str
) -> None:
    views = "analytics.performance_occupancy, analytics.daily_bookings, analytics.booking_funnel"
    with psycopg.connect(analytics_database.owner_url) as connection:
        before = documents(analytics_database.owner_url)
        if "TYPE" in change:  # a column that views show can't change
            connection.execute(f"DROP VIEW {views}".encode())
            connection.commit()
            before = documents(analytics_database.owner_url)
        connection.execute(change.encode())
    after = documents(analytics_database.owner_url)
    assert after["analytics.odcs.yaml"] != before["analytics.odcs.yaml"]
    assert after["asyncapi.yaml"] == before["asyncapi.yaml"]


def test_the_data_contract_is_valid_odcs_3_1() -> None:
    contract = committed("analytics.odcs.yaml")
    schema = json.loads(files("open_data_contract_standard").joinpath("schema.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(contract)
    assert contract["apiVersion"] == "v3.1.0"


def test_the_data_contract_has_what_is_for_analysts_described_to_the_last_column() -> None:
    relations = committed("analytics.odcs.yaml")["schema"]
    assert {relation["name"] for relation in relations} == {
        "dim_concerts", "dim_performances", "fct_reservation_events", "fct_reservations",
        "fct_reservation_seats", "daily_bookings", "performance_occupancy", "booking_funnel",
        "freshness",
    }  # fmt: skip
    for relation in relations:
        assert relation["description"], relation["name"]
        names = {column["name"] for column in relation["properties"]}
        for column in relation["properties"]:
            assert column["description"], f"{relation['name']}.{column['name']}"
            if column["name"] in {"amount", "price", "revenue"}:
                assert column["physicalType"] == "bigint"
                assert "currency" in names
            if column["name"].endswith("_at"):
                assert column["physicalType"] == "timestamp with time zone"


def references(document: object) -> Iterator[str]:
    if isinstance(document, Mapping):
        for name, value in document.items():
            if name == "$ref":
                yield str(value)
            else:
                yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


def test_the_asyncapi_document_is_whole() -> None:
    document = committed("asyncapi.yaml")
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(document["info"])
    for reference in references(document):
        place, _, path = reference.partition("#/")
        if place:
            assert (HERE / place).exists(), reference
            continue
        found: Any = document
        for part in path.split("/"):
            found = found[part]
    for operation in document["operations"].values():
        assert operation["action"] == "send"
    assert set(document["channels"]) == {"concert-reservation", "concert-catalogue"}


# ---- real events


class Recorder:
    """Stands where the service has its connection and keeps what it would have inserted."""

    autocommit = False

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def execute(self, _statement: object, parameters: Mapping[str, Any]) -> None:
        self.rows.append(parameters)


def real_events() -> list[tuple[str, str, str]]:
    """Topic, headers and payload as the service's own code writes them."""
    recorder, now = Recorder(), datetime(2026, 3, 1, 12, tzinfo=UTC)
    section = Section("Parkett", 10, 100, 200)
    performance = Performance(1, now, now, now, "scheduled", 10, [section])
    concert = Concert(1, 1, "Title", "Venue", "Europe/Berlin", "EUR", [performance])
    for kind in ("concert.published", "concert.changed"):
        write_concert(cast("Connection", recorder), concert, kind, now, None)
    found = [(row["topic"], row["headers"], row["payload"]) for row in recorder.rows]
    return found + [
        ("concert-reservation", headers, payload) for _, _, payload, headers in events.templates(4)
    ]


def closed(schema: Any) -> Any:
    """The schema with every object closed to what it doesn't name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(part) for name, part in schema.items() if name != "allOf"}
    if inner.get("type") == "object" and "properties" in inner:
        inner["additionalProperties"] = False
    return inner


def test_real_events_are_as_the_document_says_and_have_nothing_that_it_leaves_out() -> None:
    document = committed("asyncapi.yaml")
    seen = set()
    for topic, headers, payload in real_events():
        (name,) = document["channels"][topic]["messages"]
        message = document["components"]["messages"][name]
        schema = json.loads((HERE / message["payload"]["$ref"]).read_text("utf-8"))
        Draft202012Validator(schema).validate(json.loads(payload))
        Draft202012Validator(closed(schema)).validate(json.loads(payload))
        Draft202012Validator(closed(message["headers"])).validate(json.loads(headers))
        seen.add(json.loads(payload)["type"])
        assert json.loads(payload)["type"] in message["description"]
    assert {"reservation.held", "reservation.completed", "concert.changed"} <= seen
