"""The topics that the relay writes: made with explicit settings, or checked against them."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    TopicMetadata,
)

from outbox_relay.producer import make_admin

REQUEST_TIMEOUT_S = 15.0
# Of a cluster that is there; else one need not wait for it long.
ANSWER_WITHIN_S = 5.0
SAFE_REPLICATION_FACTOR = 3
# More than outbox_topics allows: what the database takes, the broker must take too.
MAX_BYTES = "1048588"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it must be: partitions and the settings that guarantees stand on."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


def wanted_topics(cursor_topic: str) -> tuple[TopicSpec, ...]:
    """Return the events' topics and the relay's own cursor topic."""
    return (
        TopicSpec(
            "concert-reservation",
            6,
            {"retention.ms": "-1", "cleanup.policy": "delete", "max.message.bytes": MAX_BYTES},
        ),
        TopicSpec(
            "concert-catalogue", 3, {"cleanup.policy": "compact", "max.message.bytes": MAX_BYTES}
        ),
        # Compaction spares the active segment: a short one keeps the cursors to read few.
        TopicSpec(
            cursor_topic,
            1,
            {"cleanup.policy": "compact", "segment.ms": "60000", "segment.bytes": "1048576"},
        ),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one topic: `made`, `fine` or `differs`, with the differences."""

    topic: str
    state: str
    differences: tuple[str, ...] = ()


def make_or_check(
    kafka_properties: Mapping[str, str],
    cursor_topic: str,
    replication_factor: int | None,
) -> list[Outcome]:
    """Make the missing topics and compare the others; nothing existing is changed.

    `replication_factor` None is 3, or the number of brokers where there are fewer.

    Raises:
        KafkaException: Kafka can't be reached or refuses.
    """
    admin = make_admin(kafka_properties)
    metadata = admin.list_topics(timeout=ANSWER_WITHIN_S)
    factor = replication_factor or min(SAFE_REPLICATION_FACTOR, len(metadata.brokers))
    outcomes = []
    for spec in wanted_topics(cursor_topic):
        if spec.name not in metadata.topics and _make(admin, spec, factor):
            outcomes.append(Outcome(spec.name, "made"))
            continue
        topic = admin.list_topics(spec.name, timeout=REQUEST_TIMEOUT_S).topics[spec.name]
        settings = request_settings(admin, [spec.name], REQUEST_TIMEOUT_S)[spec.name]()
        found = differences(spec, factor, topic, settings)
        outcomes.append(Outcome(spec.name, "differs" if found else "fine", found))
    return outcomes


def request_settings(
    admin: AdminClient, names: Iterable[str], timeout_s: float
) -> dict[str, Callable[[], dict[str, str]]]:
    """Ask for the settings of topics at once; each function returns one topic's, by name.

    What the functions raise: KafkaException, also when Kafka doesn't answer within `timeout_s`.
    """
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    futures = admin.describe_configs(resources, request_timeout=timeout_s)
    return {
        resource.name: partial(_settings, future, timeout_s) for resource, future in futures.items()
    }


def _settings(future: Future[dict[str, ConfigEntry]], timeout_s: float) -> dict[str, str]:
    # The client itself says when its time is over; twice as long only means that it is broken.
    return {name: str(entry.value) for name, entry in future.result(2 * timeout_s).items()}


def differences(
    spec: TopicSpec, factor: int, topic: TopicMetadata, settings: Mapping[str, str]
) -> tuple[str, ...]:
    """Return in what an existing topic is not as wanted, in words."""
    found = {"partitions": str(len(topic.partitions)), **settings}
    wanted = {"partitions": str(spec.partitions), **spec.config}
    differs = [
        f"{name} is {found[name]}, wanted {value}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    replicas = min((len(part.replicas) for part in topic.partitions.values()), default=0)
    if replicas < factor:
        differs.append(f"replication factor is {replicas}, wanted {factor}")
    # Too few lose events with a broker; as many as there are replicas stop with each broker.
    in_sync, wanted_in_sync = int(settings["min.insync.replicas"]), _min_in_sync(factor)
    if not wanted_in_sync <= in_sync < max(2, replicas):
        differs.append(f"min.insync.replicas is {in_sync}, wanted {wanted_in_sync}")
    return tuple(differs)


def _min_in_sync(factor: int) -> int:
    return max(1, factor - 1)


def _make(admin: AdminClient, spec: TopicSpec, factor: int) -> bool:
    """Make the topic; return False when somebody else has just done so."""
    new = NewTopic(
        spec.name,
        num_partitions=spec.partitions,
        replication_factor=factor,
        config={**spec.config, "min.insync.replicas": str(_min_in_sync(factor))},
    )
    future = admin.create_topics([new], operation_timeout=REQUEST_TIMEOUT_S)[spec.name]
    try:
        future.result(REQUEST_TIMEOUT_S)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise
    return True
