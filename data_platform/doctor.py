"""Examines what the workers stand on, and says what to do about each thing that is wrong.

Nothing is changed, and whatever hangs, the answer comes within 15 s: Postgres, Kafka and what
lies between them get a third of it each, and what doesn't answer is a finding too.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    ClusterMetadata,
    ConfigResource,
    TopicMetadata,
)
from psycopg.rows import dict_row

import migrations
from data_platform import sql, sql_doctor
from data_platform.config import Settings
from data_platform.errors import KafkaTroubleError
from data_platform.loader import APPLICATION_NAME, CONNECT_TIMEOUT_S, TRANSACTION_LIMIT_S
from data_platform.topics import StoredOffset, Topics, make_admin

PART_TIMEOUT_S = 5.0
KAFKA_REQUEST_TIMEOUT_S = 3.0
CLOCK_WARN_S = 1.0
# An analyst's question takes seconds.
HOLDS_BACK_VACUUM_S = 300.0
# Where the time is hidden: so many transactions are minutes of a busy loader.
HOLDS_BACK_VACUUM_TRANSACTIONS = 10_000
# Workers, a replay, a rebuild and an operator.
FREE_CONNECTIONS = 5
SAFE_REPLICAS = 3

# What workers and commands need, as the migrations grant it.
OUR_RIGHTS: Mapping[str, str] = {
    "fct_reservation_events": "SELECT INSERT",
    "fct_reservations": "SELECT INSERT UPDATE",
    "fct_reservation_seats": "SELECT INSERT DELETE",
    "dim_concerts": "SELECT INSERT UPDATE",
    "dim_performances": "SELECT INSERT UPDATE",
    "load_offsets": "SELECT INSERT UPDATE",
    "dead_letters": "SELECT INSERT UPDATE DELETE",
}
VIEWS = ("booking_funnel", "daily_bookings", "freshness", "performance_occupancy")
HIDDEN_FROM_ANALYSTS = ("dead_letters", "load_offsets")
MIGRATE = "data-platform migrate"

Level = Literal["ok", "warning", "error"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was examined, what was found, and, unless it is `ok`, what to do about it."""

    level: Level
    name: str
    found: str
    to_do: str = ""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as the tables need it: the least partitions, and settings without which they rot."""

    name: str
    partitions: int
    config: Mapping[str, str]


def examine_all(settings: Settings) -> list[Finding]:
    """Return a finding for each thing that workers need; a missing server is a finding too.

    Raises:
        ConfigurationError: KAFKA_PROPERTIES_FILE can't be read.
    """
    client = {**settings.client_properties(), "log_level": 0}
    of_postgres = _within_time("postgres", _examine_postgres(settings))
    of_kafka = _within_time("kafka", _examine_kafka(settings, client))
    found = [*of_postgres, *of_kafka]
    if not any(one.level == "error" and one.name in {"postgres", "kafka"} for one in found):
        found += _within_time("loading", _examine_loading(settings, client))
    return found


def render(findings: Sequence[Finding]) -> str:
    """Return a line for each finding; what other programs named themselves can't break it."""
    return "\n".join(
        "".join(char if char.isprintable() else "?" for char in _line(finding))
        for finding in findings
    )


def failed(findings: Sequence[Finding]) -> bool:
    """Whether one of them is an error: the command's exit code is 1 then."""
    return any(finding.level == "error" for finding in findings)


def _line(finding: Finding) -> str:
    line = f"{finding.level:8}{finding.name}: {' '.join(finding.found.split())}"
    return f"{line} -> {finding.to_do}" if finding.to_do else line


def _within_time(name: str, examination: Iterator[Finding]) -> list[Finding]:
    """Return what an examination finds in PART_TIMEOUT_S; a frozen server must not freeze us."""
    answers: SimpleQueue[Finding | Exception | None] = SimpleQueue()

    def examine() -> None:
        try:
            for finding in examination:
                answers.put(finding)
        except Exception as error:  # noqa: BLE001 - it is raised again by who waits for us
            answers.put(error)
        answers.put(None)

    Thread(target=examine, name=f"doctor of {name}", daemon=True).start()
    found: list[Finding] = []
    deadline_s = time.monotonic() + PART_TIMEOUT_S
    try:
        while answer := answers.get(timeout=max(0.0, deadline_s - time.monotonic())):
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
    except Empty:
        late = f"did not answer everything within {PART_TIMEOUT_S:g} s"
        found.append(Finding("error", name, late, "see whether it hangs or is overloaded"))
    return found


# --- Postgres


def _connect(settings: Settings) -> psycopg.Connection[Any]:
    connection = psycopg.connect(
        settings.analytics_database_url.get_secret_value(),
        autocommit=True,
        application_name=f"{APPLICATION_NAME} doctor",
        connect_timeout=CONNECT_TIMEOUT_S,
    )
    connection.execute(sql_doctor.LIMIT_EXAMINATION)
    return connection


def _examine_postgres(settings: Settings) -> Iterator[Finding]:
    try:
        with _connect(settings) as connection:
            for name, examine in EXAMINATIONS.items():
                yield from _examined(connection, name, examine)
    except psycopg.Error as error:
        yield Finding("error", "postgres", str(error), "see ANALYTICS_DATABASE_URL")


Examine = Callable[[psycopg.Connection[Any]], Iterator[Finding]]


def _examined(
    connection: psycopg.Connection[Any], name: str, examine: Examine
) -> Iterator[Finding]:
    """Yield what an examination finds; one that the server refuses doesn't end the others."""
    fine = True
    try:
        for finding in examine(connection):
            fine = False
            yield finding
    except psycopg.Error as error:
        if connection.closed:
            raise
        yield Finding("error", name, f"could not be examined: {error}", f"see `{MIGRATE}`")
    else:
        if fine:
            yield Finding("ok", name, "fine")


def _rows(
    connection: psycopg.Connection[Any], statement: str, parameters: Row | None = None
) -> list[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, parameters).fetchall()


def _server(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    asked_s = time.time()
    found = _rows(connection, sql_doctor.SERVER)[0]
    answered_s = time.time()
    if found["in_recovery"]:
        to_do = "let ANALYTICS_DATABASE_URL lead to the primary (target_session_attrs=primary)"
        yield Finding("error", "server", "a standby, or still recovering", to_do)
    for name in ("fsync", "full_page_writes"):
        if not found[name]:
            to_do = f"set {name} = on, and rebuild after any crash until then"
            yield Finding("error", "server", f"{name} is off: a crash may spoil tables", to_do)
    ahead_s = max(found["clock_s"] - answered_s, asked_s - found["clock_s"])
    if ahead_s > CLOCK_WARN_S:
        differs = f"Postgres' clock and this machine's differ by {ahead_s:.1f} s"
        yield Finding("warning", "clock", differs, "let NTP set both; lag and freshness are wrong")


def _revision(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    exists = _rows(connection, sql_doctor.REVISION)[0]
    if not exists["readable"]:
        found = f"database {exists['database']} has no alembic_version"
        yield Finding("error", "migrations", found, f"{MIGRATE}, or see ANALYTICS_DATABASE_URL")
        return
    revision = _rows(connection, sql_doctor.REVISION_NUMBER)[0]["revision"]
    if revision is None or revision in migrations.outdated("analytics"):
        found = f"the database is at {revision}, this version wants {migrations.head('analytics')}"
        yield Finding("error", "migrations", found, MIGRATE)
    else:
        yield Finding("ok", "migrations", revision)


def _our_rights(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    wanted = {"names": list(OUR_RIGHTS), "rights": list(OUR_RIGHTS.values())}
    for row in _rows(connection, sql_doctor.OUR_RIGHTS, wanted):
        if row["exists"]:
            to_do = f"as the owner: GRANT {row['lacking']} ON analytics.{row['name']} TO"
            lacking = f"the loader's role lacks {row['lacking']} on {row['name']}"
            yield Finding("error", "rights", lacking, f"{to_do} data_platform")
        else:
            yield Finding("error", "tables", f"analytics.{row['name']} is missing", MIGRATE)


def _analyst(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    roles = _rows(connection, sql_doctor.ANALYST)
    if not roles:
        yield Finding("error", "analyst", "there is no role analyst", MIGRATE)
        return
    role = roles[0]
    powers = [
        name.removeprefix("rol")
        for name in ("rolsuper", "rolcreaterole", "rolcreatedb", "rolreplication", "rolbypassrls")
        if role[name]
    ]
    if powers:
        to_do = "ALTER ROLE analyst " + " ".join(
            {"super": "NOSUPERUSER"}.get(power, f"NO{power.upper()}") for power in powers
        )
        yield Finding("error", "analyst", f"may more than read: {', '.join(powers)}", to_do)
    if role["is_loader"]:
        to_do = "REVOKE data_platform FROM analyst"
        yield Finding("error", "analyst", "has all that the role data_platform has", to_do)
    if role["may_create"]:
        to_do = "REVOKE CREATE ON SCHEMA analytics FROM analyst, PUBLIC"
        yield Finding("error", "analyst", "may create tables in schema analytics", to_do)
    if not role["may_use"]:
        to_do = "GRANT USAGE ON SCHEMA analytics TO analyst"
        yield Finding("error", "analyst", "may not use schema analytics", to_do)
    yield from _analyst_rights(connection)


def _analyst_rights(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    rows = _rows(connection, sql_doctor.ANALYST_RIGHTS, {"hidden": list(HIDDEN_FROM_ANALYSTS)})
    for name in sorted(set(VIEWS) - {row["name"] for row in rows}):
        yield Finding("error", "views", f"analytics.{name} is missing", MIGRATE)
    for row in rows:
        table = f"analytics.{row['name']}"
        if row["may_write"]:
            to_do = f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON {table} FROM analyst, PUBLIC"
            yield Finding("error", "analyst", f"may write to {table}", to_do)
        if row["hidden"] and row["may_read"]:
            to_do = f"REVOKE ALL ON {table} FROM analyst, PUBLIC"
            yield Finding("error", "analyst", f"may read {table}, raw records or not", to_do)
        if not row["hidden"] and not row["may_read"]:
            to_do = f"GRANT SELECT ON {table} TO analyst"
            yield Finding("warning", "analyst", f"may not read {table}", to_do)


def _comments(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in _rows(connection, sql_doctor.UNCOMMENTED):
        what = f"{row['columns']} columns, {row['first_column']} first" if row["columns"] else "it"
        found = f"analytics.{row['name']}: no comment says what {what} means"
        yield Finding("warning", "comments", found, "COMMENT ON …, or drop what nobody knows")


def _indexes(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in _rows(connection, sql_doctor.INVALID_INDEXES):
        found = f"{row['name']} was not built to its end: it costs and doesn't help"
        yield Finding("error", "indexes", found, f"REINDEX INDEX CONCURRENTLY {row['name']}")


def _frozen(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    limits = {"application_name": APPLICATION_NAME, "older_than_s": TRANSACTION_LIMIT_S}
    for row in _rows(connection, sql_doctor.FROZEN_LOADERS, limits):
        found = f"pid {row['pid']} from {row['client'] or 'a socket'} has been in a transaction for"
        holds = "holds locks" if row["writes"] else "holds a snapshot"
        to_do = f"SELECT pg_terminate_backend({row['pid']}), then see that worker: it is frozen"
        found = f"{found} {row['age_s']:.0f} s, {row['state']}, and {holds}"
        yield Finding("error", "frozen loader", found, f"{to_do} or cut off")


def _vacuum(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    limits = {
        "older_than_s": HOLDS_BACK_VACUUM_S,
        "older_than_transactions": HOLDS_BACK_VACUUM_TRANSACTIONS,
    }
    for row in _rows(connection, sql_doctor.HOLD_BACK_VACUUM, limits):
        age = f"{row['age_transactions']} transactions"
        age += "" if row["age_s"] is None else f", {row['age_s']:.0f} s"
        found = f"{row['who']} keeps dead rows of {age}: tables grow and get slower"
        yield Finding("warning", "vacuum", found, row["cure"])


def _connections(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in _rows(connection, sql_doctor.CONNECTION_LIMITS):
        free = row["allowed"] - row["used"]
        found = f"{row['whose']} has {free} free of {row['allowed']}"
        if free < FREE_CONNECTIONS:
            to_do = (
                f"raise the limit or use fewer: a worker and its commands need {FREE_CONNECTIONS}"
            )
            yield Finding("warning", "connections", found, to_do)
        else:
            yield Finding("ok", "connections", found)


def _dead_letters(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    for row in _rows(connection, sql_doctor.DEAD_LETTERS):
        found = f"{row['letters']} of {row['topic']}: {row['reason']}, the first "
        found += f"{row['age_s']:.0f} s ago"
        command = f"data-platform dead-letters replay --reason {row['reason']}"
        to_do = {
            "unknown-type": f"upgrade the workers, then {command}",
            "unknown-schema": f"upgrade the workers, then {command}",
            "refused": f"data-platform dead-letters list --reason refused, mend it, {command}",
        }.get(
            row["reason"],
            f"data-platform dead-letters list --reason {row['reason']}, mend its writer",
        )
        yield Finding("error", "dead letters", found, to_do)


EXAMINATIONS: Mapping[str, Examine] = {
    "server": _server,
    "migrations": _revision,
    "rights": _our_rights,
    "analyst": _analyst,
    "comments": _comments,
    "indexes": _indexes,
    "frozen loader": _frozen,
    "vacuum": _vacuum,
    "connections": _connections,
    "dead letters": _dead_letters,
}


# --- Kafka


def _specs(settings: Settings) -> list[TopicSpec]:
    # A finite retention deletes what a rebuild needs; a compacted one keeps a key's last event.
    kept = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    return [
        TopicSpec(settings.data_platform_reservation_topic, 6, kept),
        TopicSpec(settings.data_platform_catalogue_topic, 3, {"cleanup.policy": "compact"}),
    ]


def _examine_kafka(settings: Settings, client: Mapping[str, Any]) -> Iterator[Finding]:
    """Examine the brokers and every topic that workers read."""
    try:
        admin = make_admin(client)
        cluster = admin.list_topics(timeout=KAFKA_REQUEST_TIMEOUT_S)
    except KafkaException as error:
        found = f"no answer from {settings.kafka_bootstrap_servers}: {error.args[0].str()}"
        yield Finding("error", "kafka", found, "see KAFKA_BOOTSTRAP_SERVERS and the brokers")
        return
    yield _brokers(cluster)
    for spec in _specs(settings):
        name = f"topic {spec.name}"
        if spec.name not in cluster.topics:
            yield Finding("error", name, "is missing", "outbox-relay topics")
            continue
        try:
            configured = _settings_of(admin, spec.name)
        except KafkaException as error:
            found = f"its settings can't be read: {error.args[0].str()}"
            yield Finding("warning", name, found, "allow DescribeConfigs on it")
            continue
        differs = list(_differences(cluster, spec, configured))
        to_do = "change it with kafka-configs.sh, kafka-topics.sh or kafka-reassign-partitions.sh"
        yield (
            Finding("error", name, "; ".join(differs), to_do)
            if differs
            else Finding("ok", name, "fine")
        )


def _known_brokers(cluster: ClusterMetadata) -> set[int]:
    """Return the brokers there are: those that answer, and those that a replica belongs to."""
    parts = [part for topic in cluster.topics.values() for part in topic.partitions.values()]
    return {*cluster.brokers, *(replica for part in parts for replica in part.replicas)}


def _brokers(cluster: ClusterMetadata) -> Finding:
    known = _known_brokers(cluster)
    if missing := sorted(known - cluster.brokers.keys()):
        found = f"of {len(known)} brokers these are down: {missing}"
        return Finding("warning", "kafka", found, "bring them back")
    if len(known) < SAFE_REPLICAS:
        to_do = "run at least three: with fewer a lost disk loses events"
        return Finding("warning", "kafka", f"brokers: {len(known)}", to_do)
    return Finding("ok", "kafka", f"brokers: {len(known)}")


def _settings_of(admin: AdminClient, topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    future = admin.describe_configs([resource], request_timeout=KAFKA_REQUEST_TIMEOUT_S)[resource]
    entries = future.result(2 * KAFKA_REQUEST_TIMEOUT_S)
    return {name: str(entry.value) for name, entry in entries.items()}


def _differences(
    cluster: ClusterMetadata, spec: TopicSpec, configured: Mapping[str, str]
) -> Iterator[str]:
    topic = cluster.topics[spec.name]
    if len(topic.partitions) < spec.partitions:
        yield f"partitions are {len(topic.partitions)}, wanted {spec.partitions} or more"
    for name, value in spec.config.items():
        if configured[name] != value:
            yield f"{name} is {configured[name]}, wanted {value}"
    if leaderless := [part.id for part in topic.partitions.values() if part.leader < 0]:
        yield f"partitions {leaderless} have no leader"
    if len(_known_brokers(cluster)) >= SAFE_REPLICAS:
        yield from _unsafe(topic, configured)


def _unsafe(topic: TopicMetadata, configured: Mapping[str, str]) -> Iterator[str]:
    replicas = min((len(part.replicas) for part in topic.partitions.values()), default=0)
    if replicas < SAFE_REPLICAS:
        yield f"replication factor is {replicas}, wanted {SAFE_REPLICAS}"
    if int(configured["min.insync.replicas"]) < SAFE_REPLICAS - 1:
        yield f"min.insync.replicas is {configured['min.insync.replicas']}, wanted 2"
    if configured["unclean.leader.election.enable"] != "false":
        yield "unclean.leader.election.enable is true, wanted false"


# --- what lies between: how far the tables are, and who works on it


def _examine_loading(settings: Settings, client: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        with _connect(settings) as connection:
            yield from _compare(connection, settings, client)
    except psycopg.Error as error:
        yield Finding("error", "loading", f"could not be examined: {error}", MIGRATE)
    except KafkaException as error:
        found = f"could not be examined: {error.args[0].str()}"
        yield Finding("error", "loading", found, "see the brokers")


def _compare(
    connection: psycopg.Connection[Any], settings: Settings, client: Mapping[str, Any]
) -> Iterator[Finding]:
    topics = Topics(client)
    first = _Lag.read(connection, topics, settings)
    yield from first.faults
    group = f"group {settings.data_platform_group}"
    try:
        workers = _workers(client, settings.data_platform_group)
    except KafkaException as error:  # a new cluster's coordinator isn't there at once
        found = f"its workers are not known: {error.args[0].str()}; {first.rows} records wait"
        yield Finding("warning", group, found, "ask again, and see the brokers")
        return
    if not workers:
        level: Level = "error" if first.rows else "warning"
        found = f"no worker; {first.rows} records wait"
        yield Finding(level, group, found, "start data-platform run")
        return
    yield Finding("ok", group, f"{workers} workers, {first.rows} records wait")
    if not first.rows:
        return
    connection.execute(sql_doctor.WAIT_A_SECOND)
    second = _Lag.read(connection, topics, settings)
    if second.rows and second.loaded == first.loaded:
        found = f"{second.rows} records wait, and none was loaded within a second"
        to_do = "see the workers' logs for `waiting` and what stopped partitions there are"
        yield Finding("error", "lag", found, to_do)
    elif second.rows > first.rows:
        found = f"{second.rows} records wait, {second.rows - first.rows} more than a second ago"
        to_do = "start more workers, up to one a partition, unless it is a short burst"
        yield Finding("warning", "lag", found, to_do)


@dataclass(frozen=True, slots=True)
class _Lag:
    """How many records wait, up to where is loaded, and what stops partitions."""

    rows: int
    loaded: int
    faults: Sequence[Finding]

    @classmethod
    def read(
        cls, connection: psycopg.Connection[Any], topics: Topics, settings: Settings
    ) -> "_Lag":
        stored: dict[str, dict[int, StoredOffset]] = {}
        for row in _rows(connection, sql.READ_ALL_OFFSETS):
            place = StoredOffset(row["next_offset"], row["topic_id"])
            stored.setdefault(row["topic"], {})[row["kafka_partition"]] = place
        rows, faults = 0, []
        for spec in _specs(settings):
            name = f"topic {spec.name}"
            try:
                topic = topics.look(spec.name)
                known = stored.get(spec.name, {})
                for number in sorted({*topic.spans, *known}):
                    place = known.get(number, StoredOffset(0, topic.topic_id))
                    if fault := topic.fault(number, place):
                        to_do = "decide what is lost: see `partition_stopped` in operations.md"
                        found = f"partition {number} can't go on: {fault}"
                        faults.append(Finding("error", name, found, to_do))
                    else:
                        span = topic.spans[number]
                        rows += max(0, span.end - max(place.next_offset, span.first))
            except KafkaTroubleError as error:
                if "doesn't exist" not in str(error):  # a missing topic is told already
                    faults.append(
                        Finding("error", name, str(error), "see whether it was made anew")
                    )
        loaded = sum(place.next_offset for known in stored.values() for place in known.values())
        return cls(rows, loaded, faults)


def _workers(client: Mapping[str, Any], group: str) -> int:
    admin = make_admin(client)
    described = admin.describe_consumer_groups([group], request_timeout=KAFKA_REQUEST_TIMEOUT_S)
    try:
        return len(described[group].result(2 * KAFKA_REQUEST_TIMEOUT_S).members)
    except KafkaException as error:
        if error.args[0].name() == "GROUP_ID_NOT_FOUND":
            return 0
        raise
