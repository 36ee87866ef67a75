"""The API's description: complete, valid, true of the running service, and readable."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask import Flask
from flask.testing import FlaskClient

from reservation_service import openapi
from reservation_service.problems import KINDS
from tests.reservation_service.conftest import MakeClient, Serve
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, concert

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
RUN_TIMEOUT_S = 240
CONFIG = """
[generation]
deterministic = true
max-examples = 10
database = "none"

[phases.stateful]
enabled = false

[checks.positive_data_acceptance]
# What a schema can't say: which cursor was given out, which times follow one another.
expected-statuses = ["2xx", "304", "400", "401", "403", "404", "409", "422"]
"""


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    found: Any = client.get("/openapi.json").json
    return dict(found)


def application(client: FlaskClient) -> Flask:
    return client.application


def test_every_route_of_the_api_is_described(client: FlaskClient, document: dict[str, Any]) -> None:
    app = application(client)
    endpoints = {
        rule.endpoint
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith("/api/") or rule.endpoint in openapi.HEALTH
    }
    assert endpoints == openapi.OPERATIONS.keys()
    described = [one for path in document["paths"].values() for one in path.values()]
    assert len(described) == len(endpoints)
    assert all(one["summary"] for one in described)


def test_every_reference_leads_somewhere_and_every_schema_is_one(
    document: dict[str, Any],
) -> None:
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    for name in re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)):
        assert name in schemas, name
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_bounds_are_those_of_the_settings(make_client: MakeClient) -> None:
    found: Any = make_client(max_seats_per_request=7).get("/openapi.json").json
    schemas = found["components"]["schemas"]
    assert schemas["NewReservation"]["properties"]["seat_ids"]["maxItems"] == 7
    assert schemas["BestAvailable"]["properties"]["count"]["maximum"] == 7


def test_real_answers_hold_their_schemas(
    house: House, client: FlaskClient, document: dict[str, Any]
) -> None:
    order = house.order(house.seat_ids[0])
    made: Any = client.post("/api/reservations", json=order, headers=bearer("ann"))
    taken: Any = client.post("/api/reservations", json=order, headers=bearer("ann"))
    seats: Any = client.get(f"/api/performances/{house.performance_id}/seats")
    concerts: Any = client.get("/api/concerts")
    for name, value in (
        ("ReservationAnswer", made.json),
        ("SeatsAnswer", seats.json),
        ("ConcertAnswer", concerts.json["items"][0]),
        ("Problem", taken.json),
    ):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids, self.links, self.tags = set[str](), list[str](), set[str]()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        self.attributes |= named.keys()
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.links += [named[name] or "" for name in ("href", "src") if name in named]


def test_the_page_needs_no_script_and_no_other_site(client: FlaskClient) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200
    page = _Page()
    page.feed(answer.text)
    assert page.tags.isdisjoint({"script", "style", "iframe"})
    assert not {name for name in page.attributes if name == "style" or name.startswith("on")}
    for link in page.links:
        assert link.startswith(("#", "/")), link
        assert not link.startswith("#") or link[1:] in page.ids, link
        if link.startswith("/"):
            with client.get(link) as found:
                assert found.status_code == 200, link
    assert KINDS.keys() <= page.ids, "each problem has its anchor"
    assert (
        openapi.OPERATIONS.keys()
        <= {f"api.{one}" for one in page.ids} | {f"admin.{one}" for one in page.ids} | page.ids
    )


def test_each_kind_of_problem_is_told_in_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for kind, (status, _) in KINDS.items():
        assert re.search(rf"^\| `{kind}` \| {status}", text, re.MULTILINE), kind


@pytest.mark.timeout(2 * RUN_TIMEOUT_S + 60)
def test_schemathesis_finds_nothing_that_the_description_does_not_say(
    house: House, serve: Serve, tmp_path: Path
) -> None:
    served = serve("--workers", "1")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    of_admin = [
        part
        for endpoint, operation in openapi.OPERATIONS.items()
        if operation.caller == "admin"
        for part in ("operation-id", endpoint.removeprefix("api."))
    ]
    for authorization, which in (
        (bearer("ann")["Authorization"], "--exclude-"),
        (f"Bearer {ADMIN_TOKEN}", "--include-"),
    ):
        selected = [which + part if part == "operation-id" else part for part in of_admin]
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
                "--header", f"Authorization: {authorization}", "--no-color", *selected,
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{which}:\n{done.stdout[-6_000:]}{done.stderr[-2_000:]}"
    assert '"level": "error"' not in served.process.log.read_text()
    house.check()


def test_a_concert_as_in_the_documentation_can_be_published(client: FlaskClient) -> None:
    answer = client.post(
        "/api/concerts", json=concert(), headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}
    )
    assert answer.status_code == 201
