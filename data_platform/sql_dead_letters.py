"""The statements of `dead-letters` and its replay: static text with parameters."""

# Never its contents: they may be large, and belong to customers. Of the error the first line, not
# the DETAIL with which Postgres quotes the row.
LIST = """
SELECT topic, kafka_partition, kafka_offset, reason,
    left(split_part(error, chr(10), 1), 200) AS error, first_seen_at
FROM analytics.dead_letters
WHERE (%(topic)s::text IS NULL OR topic = %(topic)s)
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
ORDER BY first_seen_at DESC, topic, kafka_partition, kafka_offset
LIMIT %(limit)s
"""

SHOW = """
SELECT topic, kafka_partition, kafka_offset, raw_key, raw_value, raw_headers, reason, error,
    first_seen_at
FROM analytics.dead_letters
WHERE topic = %(topic)s AND kafka_partition = %(kafka_partition)s
    AND kafka_offset = %(kafka_offset)s
"""

NOW = "SELECT clock_timestamp()"

# In the primary key's order from a place on, so that no letter is tried twice; and only those that
# were there at the beginning, so that a worker that goes on putting aside doesn't keep us for ever.
PLACES_AFTER = """
SELECT topic, kafka_partition, kafka_offset,
    coalesce(octet_length(raw_key), 0) + coalesce(octet_length(raw_value), 0) AS size_bytes
FROM analytics.dead_letters
WHERE (topic, kafka_partition, kafka_offset)
        > (%(after_topic)s, %(after_partition)s, %(after_offset)s)
    AND first_seen_at <= %(until)s
    AND (%(topic)s::text IS NULL OR topic = %(topic)s)
    AND (%(kafka_partition)s::integer IS NULL OR kafka_partition = %(kafka_partition)s)
    AND (%(kafka_offset)s::bigint IS NULL OR kafka_offset = %(kafka_offset)s)
    AND (%(reason)s::text IS NULL OR reason = %(reason)s)
ORDER BY topic, kafka_partition, kafka_offset
LIMIT %(limit)s
"""

# What another replay has in hand is left to it; what it has loaded is not there any more.
LOCK = """
SELECT topic, kafka_partition, kafka_offset, raw_key, raw_value
FROM analytics.dead_letters
WHERE (topic, kafka_partition, kafka_offset) IN (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::integer[], %(offsets)s::bigint[])
)
ORDER BY topic, kafka_partition, kafka_offset
FOR UPDATE SKIP LOCKED
"""

DELETE = """
DELETE FROM analytics.dead_letters
WHERE (topic, kafka_partition, kafka_offset) IN (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::integer[], %(offsets)s::bigint[])
)
"""

# A note that the headers could not be kept is true for ever.
KEEP = """
UPDATE analytics.dead_letters SET
    reason = %(reason)s,
    error = CASE WHEN error LIKE 'headers unreadable: %%' THEN error ELSE %(error)s END
WHERE topic = %(topic)s AND kafka_partition = %(kafka_partition)s
    AND kafka_offset = %(kafka_offset)s
    AND (reason, error) IS DISTINCT FROM (%(reason)s, %(error)s)
"""
