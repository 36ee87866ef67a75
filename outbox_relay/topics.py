"""The topics that the relay writes: made with explicit settings, or checked against them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without a word
    AdminClient,
    ConfigResource,
    NewTopic,
)

REQUEST_TIMEOUT_S = 15.0
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
    admin = AdminClient({**kafka_properties, "client.id": "outbox-relay", "log_level": 0})
    metadata = admin.list_topics(timeout=REQUEST_TIMEOUT_S)
    factor = replication_factor or min(SAFE_REPLICATION_FACTOR, len(metadata.brokers))
    outcomes = []
    for spec in wanted_topics(cursor_topic):
        config = {**spec.config, "min.insync.replicas": str(max(1, factor - 1))}
        if spec.name not in metadata.topics and _make(admin, spec, config, factor):
            outcomes.append(Outcome(spec.name, "made"))
            continue
        differences = _differences(admin, spec, config, factor)
        outcomes.append(Outcome(spec.name, "differs" if differences else "fine", differences))
    return outcomes


def _make(admin: AdminClient, spec: TopicSpec, config: Mapping[str, str], factor: int) -> bool:
    """Make the topic; return False when somebody else has just done so."""
    new = NewTopic(
        spec.name,
        num_partitions=spec.partitions,
        replication_factor=factor,
        config=dict(config),
    )
    future = admin.create_topics([new], operation_timeout=REQUEST_TIMEOUT_S)[spec.name]
    try:
        future.result(REQUEST_TIMEOUT_S)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise
    return True


def _differences(
    admin: AdminClient, spec: TopicSpec, config: Mapping[str, str], factor: int
) -> tuple[str, ...]:
    topic = admin.list_topics(spec.name, timeout=REQUEST_TIMEOUT_S).topics[spec.name]
    resource = ConfigResource(ConfigResource.Type.TOPIC, spec.name)
    entries = admin.describe_configs([resource])[resource].result(REQUEST_TIMEOUT_S)
    found = {"partitions": str(len(topic.partitions))}
    wanted = {"partitions": str(spec.partitions), **config}
    found |= {name: str(entries[name].value) for name in config}
    replicas = min((len(part.replicas) for part in topic.partitions.values()), default=0)
    differences = [
        f"{name} is {found[name]}, wanted {value}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if replicas < factor:
        differences.append(f"replication factor is {replicas}, wanted {factor}")
    return tuple(differences)
