"""The relay alone beside somebody else's service: docs/adopt.md followed from an empty database."""

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from outbox_relay import doctor
from outbox_relay.config import Settings
from tests.conftest import UniqueTopic
from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import Outbox, StartRelay
from tests.waiting import wait_until

DOCS = Path(__file__).parents[2] / "docs"
ADOPT = (DOCS / "adopt.md").read_text("utf-8")
SQL = (DOCS / "examples" / "outbox.sql").read_text("utf-8")
RELAY_NAME = "shop"
# What there is of the outbox in a database: whoever reads it knows the relay's rights and ways.
OBJECTS = """
SELECT 'column', attrelid::regclass || '.' || attname, format_type(atttypid, atttypmod),
    concat_ws(' ', attnotnull, attidentity, attstorage), pg_get_expr(adbin, adrelid)
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid AND relkind IN ('r', 'p', 'v')
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE relnamespace = 'public'::regnamespace AND attnum > 0 AND relname LIKE 'outbox%'
UNION ALL SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(oid),
    '', ''
FROM pg_constraint WHERE conrelid::regclass::text LIKE 'outbox%'
UNION ALL SELECT 'index', indexname, indexdef, '', '' FROM pg_indexes
WHERE schemaname = 'public' AND tablename LIKE 'outbox%'
UNION ALL SELECT 'function', proname, pg_get_functiondef(oid),
    has_function_privilege('outbox_relay', oid, 'execute')::text,
    has_function_privilege('pg_read_all_data', oid, 'execute')::text
FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname LIKE 'outbox%'
UNION ALL SELECT 'view', viewname, definition, '', '' FROM pg_views
WHERE schemaname = 'public' AND viewname LIKE 'outbox%'
UNION ALL SELECT 'trigger', tgrelid::regclass || '.' || tgname, pg_get_triggerdef(oid), '', ''
FROM pg_trigger WHERE tgrelid::regclass::text LIKE 'outbox%'
UNION ALL SELECT 'right', table_name, privilege_type, '', ''
FROM information_schema.role_table_grants
WHERE grantee = 'outbox_relay' AND table_name LIKE 'outbox%'
UNION ALL SELECT 'setting', relname, reloptions::text, '', '' FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relname LIKE 'outbox%' AND reloptions IS NOT NULL
"""


def block(heading: str, language: str) -> str:
    """The first code of a language below something that docs/adopt.md says."""
    below = ADOPT.partition(heading)[2]
    return below.partition(f"\n```{language}\n")[2].partition("```")[0]


def settings_told(topic: str) -> dict[str, str]:
    """The settings that docs/adopt.md makes a topic with."""
    command = next(
        line for line in block("In Kafka make", "").split("kafka-topics.sh") if topic in line
    )
    return dict(re.findall(r"--config (\S+)=(\S+)", command))


@pytest.fixture
def shop(
    postgres_server: PostgresServer,
    reservation_template: ReservationDatabase,
    kafka: KafkaCluster,
    unique_topic: UniqueTopic,
) -> Iterator[Outbox]:
    """Somebody else's database, after the steps of docs/adopt.md."""
    topic = unique_topic(partitions=3, prefix="orders")
    postgres_server.create_database("shop", "shop_owner")
    owner_url = postgres_server.url(
        "shop", "shop_owner", postgres_server.give_password("shop_owner")
    )
    with psycopg.connect(postgres_server.admin_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE shop LOGIN PASSWORD 'of-a-test'")
    with psycopg.connect(owner_url) as owner:
        owner.execute("CREATE TABLE orders (order_id bigint PRIMARY KEY, state text)")
        owner.execute("INSERT INTO orders VALUES (7, 'new')")
        owner.execute("GRANT SELECT, UPDATE ON orders TO shop")
        owner.execute(SQL.encode())
        # The role is this server's: another password would lock other tests out.
        steps = re.sub(r"ALTER ROLE outbox_relay PASSWORD .*", "", block("**2. ", "sql"))
        owner.execute(steps.replace("'orders'", f"'{topic}'").encode())
    relay_url = reservation_template.relay_url.rpartition("/")[0] + "/shop"
    shop_url = re.sub("//[^@]*@", "//shop:of-a-test@", owner_url)
    database = ReservationDatabase("shop", owner_url, shop_url, relay_url)
    yield Outbox(database, kafka.bootstrap_servers, topic, RELAY_NAME)
    with psycopg.connect(postgres_server.admin_url, autocommit=True) as admin:
        admin.execute("DROP DATABASE shop WITH (FORCE)")
        admin.execute("DROP ROLE shop")


def test_the_relay_alone_publishes_another_service_s_events(
    shop: Outbox, kafka: KafkaCluster, start_relay: StartRelay
) -> None:
    cursor_topic = f"outbox-relay-cursor.{RELAY_NAME}"
    kafka.create_topic(cursor_topic, 1, settings_told(cursor_topic))
    with psycopg.connect(shop.database.service_url, autocommit=True) as service:
        statements = block("## In each transaction", "sql").replace("'orders'", f"'{shop.topic}'")
        service.execute(statements.encode())
        for forbidden in (b"SELECT * FROM outbox", b"DELETE FROM outbox"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute(forbidden)
    start_relay(shop, {"OUTBOX_RELAY_DELIVERY": "exactly_once"})
    wait_until(lambda: len(shop.records()) == 1, 30, "the order's event")
    (record,) = shop.records()
    assert (record.key, record.value) == ("7", b'{"order_id": 7, "state": "paid"}')
    found = doctor.examine_all(
        Settings(
            outbox_relay_database_url=shop.database.relay_url,
            kafka_bootstrap_servers=shop.bootstrap_servers,
            outbox_relay_name=RELAY_NAME,
        )
    )
    assert [finding for finding in found if finding.level == "error"] == []
    assert f"topic {shop.topic}" in {finding.name for finding in found}


def test_its_sql_makes_what_our_own_migrations_make(
    shop: Outbox, reservation_database: ReservationDatabase
) -> None:
    def objects(url: str) -> set[tuple[str, ...]]:
        with psycopg.connect(url) as owner:
            return set(owner.execute(OBJECTS).fetchall())

    ours, theirs = objects(reservation_database.owner_url), objects(shop.database.owner_url)
    assert len(ours) > 60
    assert theirs - ours == set()
    assert ours - theirs == set()
