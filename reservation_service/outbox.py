"""Write an event into the outbox, in the transaction of the change it tells of.

Guarantee: the event is published if and only if the caller's transaction commits. Events of one
key are published in the order of their INSERTs provided that the caller holds a lock that
belongs to the key (its row, or a transaction's advisory lock) when it calls `write`; without
one nothing is lost, but there is no order.

Any code that shares the database can use this module: it needs a connection inside a
transaction, a topic that stands in `outbox_topics`, a key and bytes of JSON.
"""

from collections.abc import Mapping

import msgspec

from reservation_service import sql
from reservation_service.database import Connection


def write(
    connection: Connection, *, topic: str, key: str, payload: bytes, headers: Mapping[str, str]
) -> None:
    """Insert one event. The relay publishes key, payload and headers as they are.

    Raises:
        psycopg.errors.CheckViolation: it could never be published (unknown topic, empty key,
            too big); the caller's transaction is then over. In a pipeline this shows at its end.
    """
    connection.execute(
        sql.INSERT_EVENT,
        {
            "topic": topic,
            "key": key,
            # UTF-8, as JSON is; sent as text so that the server keeps it byte for byte.
            "payload": payload.decode(),
            "headers": msgspec.json.encode(headers).decode(),
        },
    )
