"""Examines what the relay stands on, and says what to do about each thing that is wrong.

Nothing is changed, and whatever hangs, the answer comes within 15 s: Postgres and Kafka get half of
it each, and what doesn't answer is a finding too. (Kafka's clocks are not examined: a broker tells
its time only by a record.)
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from outbox_relay import cursor, exactly_once, leadership, pooler, sql, topics
from outbox_relay.config import Settings
from outbox_relay.producer import PublishError, make_admin
from outbox_relay.topics import TopicSpec

PART_TIMEOUT_S = 7.0
KAFKA_REQUEST_TIMEOUT_S = 3.0
# The newest migration this version was written with; a test compares.
NEWEST_REVISION = "reservations_0006"
# A booking takes milliseconds.
HOLDS_BACK_ERROR_S = 60.0
UNPUBLISHED_WARN_S = 30.0
# A cursor that is moved at all is moved each second.
CURSOR_IDLE_S = 60.0
CLOCK_WARN_S = 1.0
# For a relay and its successor: a connection a topic, one for the leadership, one for an operator.
FREE_CONNECTIONS = 10
QUERY_SHOWN_CHARS = 80
SAFE_REPLICAS = 3
TRANSACTIONS_TOPIC = "__transaction_state"
# What a record batch has besides key, value and headers.
BATCH_FRAME_BYTES = 200

Level = Literal["ok", "warning", "error"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was examined, what was found, and, unless it is `ok`, what to do about it."""

    level: Level
    name: str
    found: str
    to_do: str = ""


def examine_all(settings: Settings) -> list[Finding]:
    """Return a finding for each thing that the relay needs; a missing server is a finding too.

    Raises:
        ConfigurationError: KAFKA_PROPERTIES_FILE can't be read.
    """
    allowed_bytes: dict[str, int] = {}
    kafka_properties = settings.kafka_properties()
    return [
        *_within_time("postgres", _examine_postgres(settings, allowed_bytes)),
        *_within_time("kafka", _examine_kafka(settings, kafka_properties, allowed_bytes)),
    ]


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


def _examine_postgres(settings: Settings, allowed_bytes: dict[str, int]) -> Iterator[Finding]:
    """Examine the database, and fill `allowed_bytes` with the topics that the outbox takes."""
    try:
        with leadership.connect(settings.database_url, "doctor") as connection:
            if behind := pooler.found_in(connection):
                yield Finding("error", "pooler", behind)
                return
            yield Finding("ok", "pooler", "none: the session is the server's own")
            connection.execute(sql.LIMIT_EXAMINATION)
            for name, examine in POSTGRES_EXAMINATIONS.items():
                yield from _examined(connection, settings, name, examine)
            found = connection.execute(sql.ALLOWED_BYTES).fetchall()
            allowed_bytes.update((topic, max_bytes) for topic, max_bytes in found)
    except leadership.RefusedError as error:
        yield Finding("error", "postgres", str(error))
    except psycopg.Error as error:
        if behind := pooler.told_by(error):
            yield Finding("error", "pooler", behind)
        else:
            yield Finding("error", "postgres", str(error), "see OUTBOX_RELAY_DATABASE_URL")


Examine = Callable[[psycopg.Connection, Settings], Iterator[Finding]]


def _examined(
    connection: psycopg.Connection, settings: Settings, name: str, examine: Examine
) -> Iterator[Finding]:
    """Yield what an examination finds; one that the server refuses doesn't end the others."""
    fine = True
    try:
        for finding in examine(connection, settings):
            fine = False
            yield finding
    except psycopg.Error as error:
        if connection.closed:
            raise
        yield Finding("warning", name, f"could not be examined: {error}", "see the message")
    else:
        if fine:
            yield Finding("ok", name, "fine")


def _rows(
    connection: psycopg.Connection, statement: str, parameters: Row | None = None
) -> list[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, parameters).fetchall()


def _revision(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    revision = _rows(connection, sql.REVISION)[0]["revision"]
    if revision is None or revision < NEWEST_REVISION:
        found = f"the database is at {revision}, this version wants {NEWEST_REVISION}"
        yield Finding("error", "migrations", found, "run `reservation-service migrate`")
    else:
        yield Finding("ok", "migrations", revision)


def _server(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    asked_s = time.time()
    found = _rows(connection, sql.SERVER)[0]
    answered_s = time.time()
    if found["in_recovery"]:
        to_do = "let OUTBOX_RELAY_DATABASE_URL lead to the primary (target_session_attrs=primary)"
        yield Finding("error", "server", "a standby, or still recovering", to_do)
    for name in ("fsync", "full_page_writes"):
        if not found[name]:
            to_do = f"set {name} = on and make the server anew from a backup after any crash"
            yield Finding("error", "server", f"{name} is off: a crash may lose bookings", to_do)
    ahead_s = max(found["clock_s"] - answered_s, asked_s - found["clock_s"])
    if ahead_s > CLOCK_WARN_S:
        differs = f"Postgres' clock and this machine's differ by {ahead_s:.1f} s"
        yield Finding("warning", "clock", differs, "let NTP set both; ages and lag are wrong else")


def _identity(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    cache = _rows(connection, sql.OUTBOX_IDENTITY_CACHE)[0]["seqcache"]
    if cache != 1:
        found = f"outbox.id has CACHE {cache}, which reorders events; the relay refuses to run"
        to_do = "ALTER TABLE outbox ALTER COLUMN id SET CACHE 1, then restart the writers"
        yield Finding("error", "outbox ids", found, to_do)


def _writers(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    """Name the transactions that are seen twice, a second apart: no booking takes so long."""
    first = {row["xid"] for row in _rows(connection, sql.WRITERS)}
    if not first:
        return
    connection.execute(sql.WAIT_A_SECOND)
    for row in _rows(connection, sql.WRITERS):
        if row["xid"] in first:
            yield _holder(row)


def _holder(row: Row) -> Finding:
    age_s = max(1.0, row["age_s"] or 0.0)
    level: Level = "error" if age_s >= HOLDS_BACK_ERROR_S else "warning"
    holds = f"has held its rows of the outbox back for at least {age_s:.0f} s"
    if row["gid"] is not None:
        gid = row["gid"].replace("'", "''")
        to_do = f"COMMIT PREPARED '{gid}' or ROLLBACK PREPARED '{gid}': nobody else ends it"
        return Finding(
            level, "writers", f"prepared transaction {gid} of {row['role']} {holds}", to_do
        )
    found = f"session pid {row['pid']} of {row['role']} ({row['application_name']}) {holds}"
    to_do = f"let it commit, or end it: SELECT pg_terminate_backend({row['pid']})"
    if row["state"] is None:  # the server shows us nothing of another role's session
        to_do += "; GRANT pg_read_all_stats TO the relay's role shows its state and query"
    else:
        found += f"; {row['state']}, wait {row['wait_event'] or 'none'}"
        found += f", its last query began {row['query_age_s']:.0f} s ago: {_shown(row['query'])}"
    if row["wait_event"] == "SyncRep":
        to_do = "it has committed and waits for a synchronous standby: bring that back, or change"
        to_do += " synchronous_standby_names"
    return Finding(level, "writers", found, to_do)


def _shown(query: str) -> str:
    """Return the beginning of a query up to its first literal, which may be a customer's data."""
    head = re.split(r"'|\$[^0-9]|(?<![\w$])\d", query, maxsplit=1)[0]
    shown = " ".join(head.split())[:QUERY_SHOWN_CHARS]
    return shown if shown == query.strip() else f"{shown}…"


def _commits(connection: psycopg.Connection, settings: Settings) -> Iterator[Finding]:
    """Find writers whose commits a crash may take back after they were answered."""
    with psycopg.connect(
        settings.database_url, autocommit=True, connect_timeout=leadership.CONNECT_TIMEOUT_S
    ) as plain:
        of_server = _rows(plain, sql.SERVER_COMMIT)[0]["value"]
    for row in _rows(connection, sql.WRITERS_COMMIT, {"of_server": of_server}):
        role, value = row["role"], row["value"]
        if value == "off" or (value == "local" and row["has_standbys"]):
            yield Finding(
                "error" if value == "off" else "warning",
                "synchronous_commit",
                f"{value} for {role}: a crash or promotion may lose bookings already confirmed",
                f"ALTER ROLE {role} SET synchronous_commit = on, then restart its programs",
            )


def _connections(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    for row in _rows(connection, sql.CONNECTION_LIMITS):
        free = row["allowed"] - row["used"]
        found = f"{row['whose']} has {free} free of {row['allowed']}"
        if free < FREE_CONNECTIONS:
            to_do = f"raise the limit or use fewer: a standby relay needs up to {FREE_CONNECTIONS}"
            yield Finding("warning", "connections", found, to_do)
        else:
            yield Finding("ok", "connections", found)


def _future_rows(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    row = _rows(connection, sql.FUTURE_ROWS)[0]
    if row["rows"]:
        yield Finding(
            "error",
            "restored rows",
            f"{_count(row['rows'])} rows from id {row['first_id']} on carry transaction ids that"
            " this server has not come to (a restored dump); they are never published",
            "as the owner, with the service stopped: UPDATE outbox SET transaction_id ="
            " pg_current_xact_id() WHERE transaction_id >="
            " pg_snapshot_xmax(pg_current_snapshot()); then outbox-relay resume --from-id N with"
            " the first id that is not in Kafka",
        )


def _default_partition(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    row = _rows(connection, sql.DEFAULT_PARTITION_ROWS)[0]
    if row["rows"]:
        found = f"holds {_count(row['rows'])} rows from id {row['first_id']} on"
        to_do = "find who sets ids or the sequence by hand; once published, outbox-relay prune"
        yield Finding("error", "default partition", f"{found}: beyond all ranges", to_do)


def _quarantined(connection: psycopg.Connection, settings: Settings) -> Iterator[Finding]:
    for row in _rows(connection, sql.QUARANTINED, {"name": settings.outbox_relay_name}):
        found = f"{row['events']} of {row['topic']}, {row['refused']} of them refused by Kafka,"
        found += f" the others behind them; the first is {row['first_id']}"
        to_do = "outbox-relay quarantine list, mend the cause, outbox-relay quarantine release ID"
        yield Finding("error", "quarantined events", found, to_do)


def _unpublished(connection: psycopg.Connection, settings: Settings) -> Iterator[Finding]:
    name = settings.outbox_relay_name
    leads = leadership.holds(connection, name)
    if not leads:
        yield Finding("warning", "leader", f"no relay called {name} runs", "start outbox-relay run")
    for row in _rows(connection, sql.UNPUBLISHED, {"name": name}):
        age_s = row["age_s"]
        if age_s is not None and age_s > UNPUBLISHED_WARN_S:
            found = f"an event of {row['topic']} has waited for {age_s:.0f} s"
            to_do = "see the relay's log and `outbox-relay status`"
            yield Finding("warning" if leads else "error", "unpublished events", found, to_do)


def _history(connection: psycopg.Connection, settings: Settings) -> Iterator[Finding]:
    """Name the topics whose cursors are of another history than this database's."""
    server = leadership.examine(connection)
    for row in cursor.load_rows(connection, settings.outbox_relay_name):
        try:
            cursor.refuse_another_history(connection, cursor.from_row(row), server)
        except leadership.RefusedError as error:
            yield _refused(row["topic"], error)


def _refused(topic: str, error: Exception) -> Finding:
    found = str(error).removesuffix(cursor.REMEDY).strip()
    return Finding("error", "refused topics", f"{topic}: {found}", cursor.REMEDY)


def _cursors(connection: psycopg.Connection, settings: Settings) -> Iterator[Finding]:
    """Name the cursors that let the outbox grow, and nobody moves."""
    name = settings.outbox_relay_name
    for row in _rows(connection, sql.HOLD_RETENTION, {"name": name, "idle_s": CURSOR_IDLE_S}):
        relay, topic = row["relay_name"], row["topic"]
        found = f"relay {relay}, topic {topic}: "
        found += "no cursor" if row["idle_s"] is None else f"not moved for {row['idle_s']:.0f} s"
        found += "; the outbox's partitions stay for it"
        remove = f"DELETE FROM outbox_relay_cursor WHERE relay_name = '{relay}'"  # noqa: S608 - shown
        if relay == name:
            to_do = "the outbox takes this topic no more: make it in Kafka for its last events,"
            to_do += f" or give them up, as the owner: {remove} AND topic = '{topic}'"
        else:
            to_do = f"start that relay, or, if it runs no more, as the owner: {remove}"
        yield Finding("warning", "abandoned cursors", found, to_do)


def _standbys(connection: psycopg.Connection, _: Settings) -> Iterator[Finding]:
    for row in _rows(connection, sql.STANDBYS):
        where = f"the relay at {row['address']} (session pid {row['pid']})"
        if row["fit"]:
            yield Finding("ok", "standby", f"{where} could take over")
        else:
            found = f"{where} does not reach Kafka: it could not take over"
            to_do = "see KAFKA_BOOTSTRAP_SERVERS, and the network between that machine and Kafka"
            yield Finding("warning", "standby", found, to_do)


POSTGRES_EXAMINATIONS: Mapping[str, Examine] = {
    "server": _server,
    "migrations": _revision,
    "outbox ids": _identity,
    "writers": _writers,
    "synchronous_commit": _commits,
    "connections": _connections,
    "restored rows": _future_rows,
    "default partition": _default_partition,
    "quarantined events": _quarantined,
    "unpublished events": _unpublished,
    "refused topics": _history,
    "abandoned cursors": _cursors,
    "standby": _standbys,
}


def _count(rows: int) -> str:
    return "more than 100000" if rows > 100_000 else str(rows)


# --- Kafka


def _examine_kafka(
    settings: Settings, kafka_properties: Mapping[str, str], allowed_bytes: Mapping[str, int]
) -> Iterator[Finding]:
    """Examine the cluster and every topic that the relay writes."""
    try:
        admin = make_admin(kafka_properties)
        cluster = admin.list_topics(timeout=KAFKA_REQUEST_TIMEOUT_S)
    except KafkaException as error:
        servers = kafka_properties["bootstrap.servers"]
        found = f"no answer from {servers}: {error.args[0].str()}"
        yield Finding("error", "kafka", found, "see KAFKA_BOOTSTRAP_SERVERS and the brokers")
        return
    yield _brokers(cluster)
    # The product's own topics only where the outbox takes them: see docs/adopt.md.
    served = {*allowed_bytes, settings.cursor_topic}
    ours = topics.wanted_topics(settings.cursor_topic)
    specs = {spec.name: spec for spec in ours if not allowed_bytes or spec.name in served}
    wanted = {*specs, *allowed_bytes}
    for name in sorted(wanted - cluster.topics.keys()):
        to_do = "outbox-relay topics" if name in specs else "make it, or DELETE FROM outbox_topics"
        yield Finding("error", f"topic {name}", "is missing", to_do)
    existing = sorted({*wanted, TRANSACTIONS_TOPIC} & cluster.topics.keys())
    asked = topics.request_settings(admin, existing, KAFKA_REQUEST_TIMEOUT_S) if existing else {}
    for name, settings_of in asked.items():
        try:
            found_settings = settings_of()
        except KafkaException as error:
            found = f"its settings can't be read: {error.args[0].str()}"
            yield Finding("warning", f"topic {name}", found, "allow DescribeConfigs on it")
        else:
            spec = specs.get(name) or TopicSpec(name, len(cluster.topics[name].partitions))
            problems = list(_topic(cluster, spec, found_settings, allowed_bytes.get(name, 0)))
            yield from problems or [Finding("ok", f"topic {name}", "fine")]
    if TRANSACTIONS_TOPIC not in cluster.topics and len(_known_brokers(cluster)) >= SAFE_REPLICAS:
        yield from _transactions_to_be(admin, min(cluster.brokers))
    if settings.cursor_topic in cluster.topics:
        yield from _cursor_in_kafka(settings, allowed_bytes.keys() & cluster.topics.keys())


def _cursor_in_kafka(settings: Settings, names: Iterable[str]) -> Iterator[Finding]:
    """Name the topics whose cursors tell of another Kafka, or of another state of this one."""
    name = settings.outbox_relay_name
    try:
        with leadership.connect(settings.database_url, "doctor") as connection:
            at_rest = not leadership.holds(connection, name)
            for topic in sorted(names):
                try:
                    exactly_once.refuse_as_a_lane_would(
                        settings, connection, topic, at_rest=at_rest
                    )
                except leadership.RefusedError as error:
                    yield _refused(topic, error)
    except (psycopg.Error, leadership.RefusedError):
        return  # told by the examination of Postgres
    except (KafkaException, PublishError, TimeoutError) as error:
        found = f"could not be compared with Kafka: {error}"
        yield Finding("warning", "refused topics", found, "see whether it hangs or is overloaded")


def _known_brokers(cluster: ClusterMetadata) -> set[int]:
    """Return the brokers there are: those that answer, and those that a replica belongs to.

    One that is down must not make two replicas look like all that this cluster can have.
    """
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


def _topic(
    cluster: ClusterMetadata, spec: TopicSpec, settings: Mapping[str, str], allowed_bytes: int
) -> Iterator[Finding]:
    topic = cluster.topics[spec.name]
    yield from _replicas(topic, settings)
    factor = min(SAFE_REPLICAS, len(_known_brokers(cluster)))
    differs = list(topics.differences(spec, factor, topic, settings))
    if factor == SAFE_REPLICAS and settings["unclean.leader.election.enable"] != "false":
        differs.append("unclean.leader.election.enable is true, wanted false")
    taken_bytes = int(settings["max.message.bytes"])
    if taken_bytes < allowed_bytes + BATCH_FRAME_BYTES:
        differs.append(
            f"max.message.bytes is {taken_bytes}, while outbox_topics allows {allowed_bytes}"
        )
    if differs:
        to_do = "change it with kafka-configs.sh or kafka-reassign-partitions.sh"
        yield Finding("error", f"topic {spec.name}", "; ".join(differs), to_do)


def _replicas(topic: TopicMetadata, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Find partitions that can't be written, or that the next lost broker may stop."""
    name, wanted = f"topic {topic.topic}", int(settings["min.insync.replicas"])
    parts = topic.partitions.values()
    unwritable = [part.id for part in parts if part.leader < 0 or len(part.isrs) < wanted]
    if unwritable:
        found = f"partitions {unwritable} have fewer than {wanted} in-sync replicas or no leader"
        yield Finding("error", name, f"{found}: nothing can be written", "bring the brokers back")
    elif behind := [part.id for part in parts if len(part.isrs) < len(part.replicas)]:
        found = f"partitions {behind} have replicas that are not in sync"
        yield Finding("warning", name, found, "see whether a broker is down or slow")


def _transactions_to_be(admin: AdminClient, broker: int) -> Iterator[Finding]:
    """Examine how the brokers will make the topic of transactions, at the first of them."""
    resource = ConfigResource(ConfigResource.Type.BROKER, str(broker))
    future = admin.describe_configs([resource], request_timeout=KAFKA_REQUEST_TIMEOUT_S)[resource]
    try:
        entries = future.result(2 * KAFKA_REQUEST_TIMEOUT_S)
    except KafkaException as error:
        found = f"the brokers' settings can't be read: {error.args[0].str()}"
        yield Finding("warning", TRANSACTIONS_TOPIC, found, "allow DescribeConfigs on the cluster")
        return
    for name, least in (("replication.factor", SAFE_REPLICAS), ("min.isr", SAFE_REPLICAS - 1)):
        setting = f"transaction.state.log.{name}"
        if int(entries[setting].value) < least:
            found = f"{setting} is {entries[setting].value}, wanted {least}"
            to_do = "change it in server.properties before the first transaction"
            yield Finding("error", TRANSACTIONS_TOPIC, found, to_do)
