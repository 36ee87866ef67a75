"""What more workers gain, and what becomes of a share when its worker goes.

`promise workers`: a full topic of six partitions and so many workers, all of them members with
their shares before the first record is there. Their database is TRIP_MS away and back: what they
share is waiting, so that two cores suffice to see what more workers gain. How the broker shares
out decides as well: by its own default some workers get only partitions of the catalogue.

`promise worker goes`: events are committed at a steady rate and go through the relay to three
workers, of which one that has partitions is killed (SIGKILL), or asked to end (SIGTERM). Each event
counts from its commit to the commit that made it visible in the tables, by the servers' clocks:
`longest_s` of the partitions that the worker had, `others_s` of those it had not. The broker itself
is asked how long it waits for a member that says nothing.
"""

import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack

from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    ConfigResource,
)

from benchmarks import events, latency, load, topic
from benchmarks.loader import analytics, empty, watch_processes
from benchmarks.promise_parts import (
    begin_here,
    loaded,
    long_way,
    make_topics,
    named,
    relay,
    through,
    worker,
)
from benchmarks.results import Figure, Results
from benchmarks.surroundings import Surroundings, check_alive
from devstack.kafka import KafkaCluster
from devstack.processes import Process, wait_until
from outbox_relay.producer import make_admin

WORKERS, GOES = "promise workers", "promise worker goes"
TRIP_MS = 20
BATCH_ROWS = 100
EVENTS, FEW_EVENTS = 4_000, 3_000
# How the broker shares out: each topic by itself, as ours ask it, or all topics together.
RANGE, UNIFORM = "range", "uniform"
TEAMS = (*((count, RANGE) for count in (1, 2, 3, 6, 8)), (6, UNIFORM))
GROUP_TIMEOUT_S, REST_S = 60.0, 1.5
# Of the worker that goes.
MEMBERS, RATE = 3, 200
BEFORE_S, AFTER_S, AFTER_STOP_S = 2, 4, 6
HOW = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}
SESSION = "group.consumer.session.timeout.ms"
VISIBLE = """
SELECT reservation_id, kafka_partition,
       extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8
FROM analytics.fct_reservation_events WHERE reservation_id = ANY (%s)
"""
FACTS = "SELECT count(*) FROM analytics.fct_reservation_events"

Seen = Mapping[bytes, tuple[int, float]]


def measure(around: Surroundings, results: Results, rounds: int) -> None:
    """Measure both."""
    with results.tolerating({"section": WORKERS, "contender": "all"}):
        _scale_out(around, results, few=rounds == 1)
    for what in HOW:
        for number in range(1, rounds + 1):
            labels = {"section": GOES, "contender": what, "round": number}
            with around.steps.step(f"a worker is {what}, round {number}"):
                results.attempt(labels, lambda w=what: _lose_worker(around, w))  # type: ignore[misc]


# ---- more workers


def _scale_out(around: Surroundings, results: Results, *, few: bool) -> None:
    for count, assignor in TEAMS:
        rows = (FEW_EVENTS if few else EVENTS) * min(count, 3)
        name = f"{count}, {assignor}"
        with around.steps.step(f"{name} workers, six partitions"):
            labels = {"section": WORKERS, "contender": name, "workers": count, "rows": rows}
            results.attempt(
                labels | {"assignor": assignor},
                lambda c=count, a=assignor, r=rows: _share(around, c, a, r),  # type: ignore[misc]
            )


def _share(around: Surroundings, count: int, assignor: str, rows: int) -> Figure:
    empty(around)
    name = group = f"bench-workers-{time.time_ns()}"
    make_topics(around, name)
    with ExitStack() as cleanup:
        proxy = cleanup.enter_context(long_way(around, TRIP_MS / 2_000))
        settings = {"DATA_PLATFORM_BATCH_ROWS": str(BATCH_ROWS), **named(name)}
        settings |= {"DATA_PLATFORM_GROUP": group} | through(around, proxy)
        settings |= _properties(around, assignor, f"group.remote.assignor={assignor}")
        running = [
            cleanup.enter_context(worker(around, settings, f"worker-{number}"))
            for number in range(count)
        ]
        shares = await_shares(around, group, name, count)
        for check in map(check_alive, running):
            check()
        topic.fill(around.bootstrap_servers, name, rows)
        found = watch_processes(around, running, lambda c: loaded(c, name), rows)
    with analytics(around) as connection:
        facts = (connection.execute(FACTS).fetchone() or (0,))[0]
    busy = sum(share > 0 for share in shares)
    return {"with_partitions": busy, "idle": count - busy, "lost": rows - facts} | {
        "largest_share": max(shares),
        "events_per_s": found["events_per_s"],
        # Of each core one: the machine wasn't the limit where this is well below its cores.
        "cores_busy": round(cpu_us(found) / found["us_per_event"], 2),
    }


def cpu_us(figure: Figure) -> float:
    names = ("cpu_us_per_event", "postgres_us_per_event", "kafka_us_per_event")
    return sum(float(figure[name]) for name in names)


def await_shares(around: Surroundings, group: str, name: str, members: int) -> list[int]:
    """Wait until so many members have the topic's partitions; return how many each has."""
    admin = make_admin({"bootstrap.servers": around.bootstrap_servers})

    def shares() -> list[int]:
        try:
            owned = members_of(admin, group, name)
        except KafkaException:  # the group's coordinator is just being found
            return []
        whole = len(owned) == members and sum(map(len, owned.values())) == events.PARTITIONS
        return [len(partitions) for partitions in owned.values()] if whole else []

    before: list[int] = []
    until = time.monotonic() + GROUP_TIMEOUT_S
    # Twice the same: a member that has just come is still to be given something.
    while time.monotonic() < until:
        found = wait_until(shares, GROUP_TIMEOUT_S, f"{members} members with their shares")
        if found == before:
            return found
        before = found
        time.sleep(REST_S)
    raise TimeoutError(f"the shares of {members} members never came to rest")


def members_of(admin: AdminClient, group: str, name: str) -> dict[str, set[int]]:
    """Return each member's partitions of a topic, by its client id and its own id."""
    described = admin.describe_consumer_groups([group])[group].result(GROUP_TIMEOUT_S)
    return {
        f"{member.client_id} {member.member_id}": {
            part.partition
            for part in (member.assignment.topic_partitions if member.assignment else ())
            if part.topic == name
        }
        for member in described.members
    }


# ---- one worker less


def _lose_worker(around: Surroundings, what: str) -> Figure:
    begin_here(around)
    group = f"promise-{time.monotonic_ns()}"
    session_s = broker_setting_s(around.kafka, SESSION)
    with ExitStack() as cleanup:
        cleanup.enter_context(relay(around))
        running = {
            name: cleanup.enter_context(worker(around, _called(around, name, group), name))
            for name in (f"worker-{number}" for number in range(1, MEMBERS + 1))
        }
        await_shares(around, group, events.TOPIC, MEMBERS)
        name, partitions = _largest_share(around, group)
        after_id = events.last_id(around.owner_url)
        waits_s = BEFORE_S + (session_s + AFTER_S if what == "killed" else AFTER_STOP_S)
        writers = load.start(
            around, load.SINGLE, clients=latency.CLIENTS, seconds=round(waits_s), rate=RATE
        )
        time.sleep(BEFORE_S)
        _strike(running[name], what)
        per_s = writers.finish()
        committed = latency.commit_times(around, after_id)
        seen = _await_seen(around, committed)
    late_s = longest_s(committed, seen, partitions)
    return {"session_s": session_s, "members": MEMBERS, "partitions": len(partitions)} | {
        "events": len(committed),
        "written_per_s": round(per_s),
        "lost": len(committed) - len(seen),
        **late_s,
    }


def longest_s(
    committed: Mapping[bytes, float], seen: Seen, struck: set[int]
) -> dict[str, float | None]:
    """Return the longest way of an event into the tables, of `struck` partitions and of others."""
    ways: dict[str, list[float]] = {"longest_s": [], "others_s": []}
    for key, (partition, visible_at) in seen.items():
        kind = "longest_s" if partition in struck else "others_s"
        ways[kind].append(visible_at - committed[key])
    return {kind: round(max(found), 2) if found else None for kind, found in ways.items()}


def _called(around: Surroundings, name: str, group: str) -> dict[str, str]:
    """Return what gives a worker a name by which the group knows it."""
    return {"DATA_PLATFORM_GROUP": group} | _properties(around, name, f"client.id={name}")


def _properties(around: Surroundings, name: str, line: str) -> dict[str, str]:
    """Return what gives a worker a property of librdkafka."""
    file = around.stack.run.path / f"promise-{name}.properties"
    file.write_text(f"{line}\n", encoding="ascii")
    return {"KAFKA_PROPERTIES_FILE": str(file)}


def _largest_share(around: Surroundings, group: str) -> tuple[str, set[int]]:
    admin = make_admin({"bootstrap.servers": around.bootstrap_servers})
    owned = members_of(admin, group, events.TOPIC)
    name = max(owned, key=lambda member: len(owned[member]))
    return name.partition(" ")[0], owned[name]


def _strike(process: Process, what: str) -> None:
    process.send_signal(HOW[what])


def _await_seen(around: Surroundings, committed: Mapping[bytes, float]) -> Seen:
    """Return where and when each event became visible; those that never do are missing."""
    names = [key.decode() for key in committed]
    until = time.monotonic() + GROUP_TIMEOUT_S
    while True:
        with analytics(around) as connection:
            found = {
                name.encode(): (partition, at)
                for name, partition, at in connection.execute(VISIBLE, [names])
            }
        if len(found) == len(names) or time.monotonic() > until:
            return found
        time.sleep(REST_S)


def broker_setting_s(kafka: KafkaCluster, name: str) -> float:
    """Return a setting in milliseconds as seconds, as the first broker has it."""
    admin = make_admin({"bootstrap.servers": kafka.bootstrap_servers})
    broker = ConfigResource(ConfigResource.Type.BROKER, str(kafka.brokers[0].node_id))
    found = admin.describe_configs([broker])[broker].result(GROUP_TIMEOUT_S)
    return int(found[name].value) / 1_000
