"""Quix Streams' PostgreSQL sink: `python -m benchmarks.quix_sink TOPIC GROUP COMMIT_ROWS`.

It upserts flat records until it is stopped.
"""

import os
import sys
from urllib.parse import unquote, urlsplit

# Only in a folder of the benchmark's (`quix.installed`).
from quixstreams import Application  # type: ignore[import-not-found]
from quixstreams.sinks.community.postgresql import (  # type: ignore[import-not-found]
    PostgreSQLSink,
)


def main(topic: str, group: str, commit_rows: str) -> None:
    """Load until stopped."""
    url = urlsplit(os.environ["ANALYTICS_OWNER_DATABASE_URL"])
    application = Application(
        broker_address=os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        consumer_group=group,
        auto_offset_reset="earliest",
        commit_every=int(commit_rows),
    )
    stream = application.dataframe(application.topic(topic, value_deserializer="json"))
    stream.sink(
        PostgreSQLSink(
            host=url.hostname,
            port=url.port,
            dbname=url.path.removeprefix("/"),
            user=unquote(url.username or ""),
            password=unquote(url.password or ""),
            schema_name="analytics",
            table_name="fct_reservations",
            schema_auto_update=False,
            primary_key_columns="reservation_id",
            upsert_on_primary_key=True,
            include_metadata=False,
        )
    )
    application.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
