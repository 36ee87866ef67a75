"""The steps of docs/operations.md, taken on a running product: nothing is lost by any of them."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer

from devstack.customers import Customers
from devstack.demo import seats_on_sale
from devstack.postgres import PostgresServer
from devstack.processes import Process
from devstack.stack import Stack
from devstack.steps import Steps
from tests.compatibility.scene import Scene
from tests.outbox_relay.records import read_topic
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

TOPIC = "concert-reservation"
FACTS = "SELECT count(*) FROM analytics.fct_reservation_events"
EVENTS = "SELECT count(*) FROM outbox WHERE topic = %s"
FIRST_UNPUBLISHED = "SELECT min(id) FROM outbox WHERE topic = %s AND payload ->> 'id' <> ALL (%s)"
DEAD = "SELECT kafka_partition, kafka_offset FROM analytics.dead_letters"
BOOKINGS = 30


class Shop:
    """Service, relay and a worker on a stack; customers come when they are called."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.stack = scene.stack
        self.relay = self.worker = self.begin_service()
        self.begin_relay()
        self.begin_worker()

    def begin_service(self) -> Process:
        self.url = self.scene.service("service")
        return self.scene.parts["service"]

    def begin_relay(self) -> None:
        self.relay = self.scene.relay("relay")
        self.scene.await_said(self.relay, "leading")

    def begin_worker(self) -> None:
        self.worker = self.scene.worker("worker")
        self.scene.await_said(self.worker, "partitions_placed")

    def book(self) -> None:
        """Let customers book, confirm and cancel."""
        key = self.stack.environment["RESERVATION_SECRET_KEY"]
        seats = seats_on_sale(self.url)
        Customers(
            self.url, self.url, secret_key=key, seats_by_performance=seats, on_booked=lambda _: None
        ).book(BOOKINGS, 2)

    def ask(self, variable: str, query: str, *parameters: object) -> int:
        with psycopg.connect(self.stack.environment[variable]) as connection:
            return int((connection.execute(query.encode(), parameters).fetchone() or (0,))[0])

    def await_loaded(self, events: int | None = None) -> int:
        """Wait until the tables have every event that the outbox has, or so many."""
        wanted = events or self.ask("RESERVATION_OWNER_DATABASE_URL", EVENTS, TOPIC)
        wait_until(
            lambda: self.ask("ANALYTICS_OWNER_DATABASE_URL", FACTS) == wanted,
            40,
            f"{wanted} events in the tables",
        )
        return wanted

    def lag_rows(self, package: str) -> int:
        return int(json.loads(self.run(package, "status", "--json"))["lag_rows"])

    def run(self, package: str, *arguments: str, exits: int = 0) -> str:
        """Run a command to its end; return what it said."""
        command = self.scene.begin(f"step-{len(self.scene.parts)}", package, *arguments)
        wait_until(lambda: not command.alive, 60, f"the end of {package} {arguments}")
        said = command.log.read_text("utf-8")
        assert command.stop() == exits, said
        return said


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with Steps() as steps, Stack(1, steps) as stack:
        stack.start()
        with Scene(stack) as scene:
            scene.command("reservation_service", "seed-demo")
            shop = Shop(scene)
            shop.book()
            shop.await_loaded()
            yield shop


def refused(shop: Shop) -> None:
    """See a relay refuse the events' topic; another topic of which nothing is lost may go on."""
    relay = shop.scene.relay("relay-refuses")
    wait_until(lambda: "resume --from-id" in relay.log.read_text("utf-8"), 40, "a refusal")
    relay.stop()


def backup(server: PostgresServer, folder: Path) -> None:
    """Copy the data of a server, which is stopped for it."""
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)
    copy(server.data_folder, folder)
    server.start()


def restore(server: PostgresServer, folder: Path) -> None:
    """Put a copy in the place of a server's data."""
    server.stop()
    shutil.rmtree(server.data_folder)
    copy(folder, server.data_folder)
    server.start()


def copy(source: Path, target: Path) -> None:
    """Copy a data folder with its owner."""
    shutil.copytree(source, target)
    owner = source.stat()
    for path in [target, *target.rglob("*")]:
        shutil.chown(path, owner.st_uid, owner.st_gid)


def test_every_look_at_the_parts_finds_nothing_wrong(shop: Shop) -> None:
    for package in ("outbox_relay", "data_platform"):  # a cursor's copy is a second old at most
        wait_until(lambda part=package: shop.lag_rows(part) == 0, 20, f"no lag of {package}")  # type: ignore[misc]
    for package, *command in (
        ("outbox_relay", "doctor"),
        ("outbox_relay", "topics"),
        ("outbox_relay", "quarantine", "list"),
        ("outbox_relay", "prune"),
        ("data_platform", "doctor"),
        ("data_platform", "dead-letters", "list"),
        ("data_platform", "reconcile"),
        ("data_platform", "rebuild", "--dry-run"),
        ("data_platform", "report", "--output", str(shop.stack.run.path / "report.html")),
        ("reservation_service", "migrate"),
        ("data_platform", "migrate"),
    ):
        shop.run(package, *command)


def test_a_poison_event_is_found_and_kept_until_somebody_has_decided(shop: Shop) -> None:
    producer = Producer({"bootstrap.servers": shop.stack.environment["KAFKA_BOOTSTRAP_SERVERS"]})
    producer.produce(TOPIC, b"poison", "nobody")
    producer.flush(20)
    letters = "SELECT count(*) FROM analytics.dead_letters"
    wait_until(lambda: shop.ask("ANALYTICS_OWNER_DATABASE_URL", letters) == 1, 20, "a dead letter")
    assert TOPIC in shop.run("data_platform", "dead-letters", "list")
    with psycopg.connect(shop.stack.environment["ANALYTICS_OWNER_DATABASE_URL"]) as owner:
        partition, offset = owner.execute(DEAD).fetchone() or (None, None)
        place = (TOPIC, str(partition), str(offset))
        shown = json.loads(shop.run("data_platform", "dead-letters", "show", *place))
        assert base64.b64decode(shown["raw_value"]) == b"poison"
        shop.run("data_platform", "dead-letters", "replay", "--dry-run")
    shop.run("data_platform", "reconcile")


def test_tables_are_rebuilt_while_people_book(shop: Shop) -> None:
    shop.book()
    shop.run("data_platform", "rebuild")
    shop.book()
    shop.await_loaded()
    shop.run("data_platform", "reconcile")


def test_restored_tables_are_loaded_again_from_where_they_were(shop: Shop, tmp_path: Path) -> None:
    shop.worker.stop()
    backup(shop.stack.analytics, tmp_path / "analytics")
    before = shop.ask("ANALYTICS_OWNER_DATABASE_URL", FACTS)
    shop.begin_worker()
    shop.book()
    shop.await_loaded()
    shop.worker.stop()
    restore(shop.stack.analytics, tmp_path / "analytics")
    assert shop.ask("ANALYTICS_OWNER_DATABASE_URL", FACTS) == before
    shop.begin_worker()
    assert shop.await_loaded() > before
    shop.run("data_platform", "reconcile")


def test_lost_tables_are_loaded_again_from_the_beginning(shop: Shop) -> None:
    shop.worker.stop()
    shop.stack.analytics.drop_database("analytics")
    shop.stack.analytics.create_database("analytics", "analytics_owner")
    shop.run("data_platform", "migrate")
    shop.begin_worker()
    shop.await_loaded()
    shop.run("data_platform", "reconcile")


def test_after_a_restore_of_the_reservations_the_relay_waits_for_a_decision(
    shop: Shop, tmp_path: Path
) -> None:
    shop.scene.parts["service"].stop()
    shop.relay.stop()
    backup(shop.stack.reservations, tmp_path / "reservations")
    shop.begin_service()
    shop.begin_relay()
    shop.book()
    in_kafka = shop.await_loaded()
    shop.scene.parts["service"].stop()
    shop.relay.stop()
    restore(shop.stack.reservations, tmp_path / "reservations")
    shop.begin_service()
    refused(shop)
    kept = shop.ask("RESERVATION_OWNER_DATABASE_URL", EVENTS, TOPIC)
    shop.book()  # nobody who books has to wait for that decision
    booked = shop.ask("RESERVATION_OWNER_DATABASE_URL", EVENTS, TOPIC) - kept
    servers = shop.stack.environment["KAFKA_BOOTSTRAP_SERVERS"]
    published = re.findall(
        rb'"id":"([^"]+)"', b"".join(r.value for r in read_topic(servers, TOPIC))
    )
    ids = [found.decode() for found in published]
    first = str(shop.ask("RESERVATION_OWNER_DATABASE_URL", FIRST_UNPUBLISHED, TOPIC, ids))
    shop.run("outbox_relay", "resume", "--from-id", first)
    refused(shop)
    shop.run("outbox_relay", "resume", "--from-id", first, "--apply")
    shop.run("outbox_relay", "quarantine", "list")
    shop.begin_relay()
    shop.await_loaded(in_kafka + booked)
    assert "extra" in shop.run("data_platform", "reconcile", exits=1)
