"""The outbox relay: a daemon that publishes the reservation database's outbox to Kafka.

    rows (reader) -> records (publisher) -> acknowledgements -> cursor (leadership)

`relay` is the loop that turns this wheel; the other modules know nothing of each other.
"""

from importlib.metadata import version

__version__ = version("concert-reservation")
