"""Whether Kafka answers this process: asked in a thread of its own, so that nobody waits for it."""

import threading
from collections.abc import Mapping

from confluent_kafka import KafkaException

from outbox_relay.producer import make_admin

TIMEOUT_S = 2.0
# With the timeout less than for how long a leader bears with Kafka: when both lose it, the standby
# has noticed before the leader looks for a better one.
INTERVAL_S = 1.0


class Reach:
    """Asks Kafka again and again, until stopped.

    `asked` is False until there is a first answer; `error` is what is wrong, None when nothing is.
    """

    def __init__(self, kafka_properties: Mapping[str, str]) -> None:
        self.asked = False
        self.error: str | None = None
        self._kafka_properties = {**kafka_properties, "reconnect.backoff.max.ms": "1000"}
        self._stopping = threading.Event()
        threading.Thread(target=self._ask, name="reach of kafka", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopping.set()

    @property
    def answers(self) -> bool:
        """Whether Kafka has answered the last question."""
        return self.asked and self.error is None

    def _ask(self) -> None:
        admin = make_admin(self._kafka_properties)
        while not self._stopping.is_set():
            try:
                admin.list_topics(timeout=TIMEOUT_S)
            except KafkaException as error:
                self.error = error.args[0].str()
            else:
                self.error = None
            self.asked = True
            self._stopping.wait(INTERVAL_S)
