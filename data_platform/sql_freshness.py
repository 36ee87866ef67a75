"""What `freshness` asks and writes."""

# A row that somebody holds for longer is left for the next round.
SESSION = """
SELECT
    set_config('lock_timeout', '1s', false),
    set_config('statement_timeout', '5s', false),
    set_config('timezone', 'UTC', false)
"""

READ_PLACES = """
SELECT topic, kafka_partition, next_offset, topic_id, complete_up_to,
    clock_timestamp() AS asked_at
FROM analytics.load_offsets
WHERE topic = ANY (%(topics)s)
ORDER BY topic, kafka_partition
"""

# The conditions make it true whatever has happened since the offsets were read.
MARK_COMPLETE = """
UPDATE analytics.load_offsets SET complete_up_to = %(complete_up_to)s
WHERE topic = %(topic)s AND kafka_partition = %(kafka_partition)s AND topic_id = %(topic_id)s
    AND next_offset >= %(end)s
    AND (complete_up_to IS NULL OR complete_up_to < %(complete_up_to)s)
"""

# The number tells whether to act, not how much there is to do: bounded, for it is asked often.
COUNT_DEAD_LETTERS = """
SELECT count(*) FROM (SELECT FROM analytics.dead_letters LIMIT 10000) AS kept
"""
