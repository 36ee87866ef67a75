"""The statements of `doctor`: static text with parameters, for the loader's role.

The catalogues are asked by names and ids, so a missing table is a row and not an error.
"""

LIMIT_EXAMINATION = (
    "SELECT set_config('statement_timeout', '3s', false), set_config('lock_timeout', '1s', false)"
)

SERVER = """
SELECT pg_is_in_recovery() AS in_recovery,
    extract(epoch FROM clock_timestamp())::float8 AS clock_s,
    current_setting('fsync')::boolean AS fsync,
    current_setting('full_page_writes')::boolean AS full_page_writes
"""

REVISION = """
SELECT to_regclass('public.alembic_version') IS NOT NULL AS readable,
    current_database() AS database
"""
REVISION_NUMBER = "SELECT max(version_num) AS revision FROM public.alembic_version"

# What is missing altogether, and which of the wanted rights our role lacks.
OUR_RIGHTS = """
SELECT wanted.name, found.oid IS NOT NULL AS exists,
    coalesce(string_agg(kind, ', ') FILTER (
        WHERE NOT has_table_privilege(found.oid, kind)
    ), '') AS lacking
FROM unnest(%(names)s::text[], %(rights)s::text[]) AS wanted (name, rights)
CROSS JOIN LATERAL unnest(string_to_array(wanted.rights, ' ')) AS kind
LEFT JOIN pg_namespace AS schema ON schema.nspname = 'analytics'
LEFT JOIN pg_class AS found ON found.relnamespace = schema.oid AND found.relname = wanted.name
GROUP BY wanted.name, found.oid
HAVING found.oid IS NULL OR bool_or(NOT has_table_privilege(found.oid, kind))
ORDER BY wanted.name
"""

ANALYST = """
SELECT rolname, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls,
    rolsuper OR pg_has_role(oid, 'data_platform', 'MEMBER') AS is_loader,
    has_schema_privilege(oid, to_regnamespace('analytics'), 'CREATE') AS may_create,
    has_schema_privilege(oid, to_regnamespace('analytics'), 'USAGE') AS may_use
FROM pg_roles WHERE rolname = 'analyst'
"""

# Column rights count too: has_any_column_privilege is also true for a right on the whole table.
ANALYST_RIGHTS = """
SELECT relation.relname AS name,
    relation.relname = ANY (%(hidden)s) AS hidden,
    has_any_column_privilege('analyst', relation.oid, 'SELECT') AS may_read,
    has_any_column_privilege('analyst', relation.oid, 'INSERT')
        OR has_any_column_privilege('analyst', relation.oid, 'UPDATE')
        OR has_table_privilege('analyst', relation.oid, 'DELETE')
        OR has_table_privilege('analyst', relation.oid, 'TRUNCATE') AS may_write
FROM pg_class AS relation
WHERE relation.relnamespace = to_regnamespace('analytics')
    AND relation.relkind IN ('r', 'p', 'v', 'm', 'f')
ORDER BY relation.relname
"""

UNCOMMENTED = """
SELECT relation.relname AS name, count(*) AS columns, min(attribute.attname) AS first_column
FROM pg_class AS relation
JOIN pg_attribute AS attribute
    ON attribute.attrelid = relation.oid AND attribute.attnum >= 0 AND NOT attribute.attisdropped
WHERE relation.relnamespace = to_regnamespace('analytics')
    AND relation.relkind IN ('r', 'p', 'v', 'm')
    AND col_description(relation.oid, attribute.attnum) IS NULL
GROUP BY relation.relname
UNION ALL
SELECT relation.relname, 0, NULL
FROM pg_class AS relation
WHERE relation.relnamespace = to_regnamespace('analytics')
    AND relation.relkind IN ('r', 'p', 'v', 'm')
    AND obj_description(relation.oid, 'pg_class') IS NULL
ORDER BY 1
"""

# What a CREATE INDEX CONCURRENTLY that failed leaves behind: it costs and doesn't help.
INVALID_INDEXES = """
SELECT index.indexrelid::regclass::text AS name
FROM pg_index AS index
JOIN pg_class AS relation ON relation.oid = index.indrelid
WHERE relation.relnamespace = to_regnamespace('analytics') AND NOT index.indisvalid
    AND NOT EXISTS (
        SELECT FROM pg_stat_progress_create_index AS progress
        WHERE progress.index_relid = index.indexrelid
    )
ORDER BY 1
"""

# A loader's transaction is cut after 20 s by itself. One that is older is of a loader that is
# frozen, or cut off without Postgres knowing.
FROZEN_LOADERS = """
SELECT activity.pid, activity.client_addr::text AS client, activity.state,
    activity.backend_xid IS NOT NULL AS writes,
    extract(epoch FROM clock_timestamp() - activity.xact_start)::float8 AS age_s
FROM pg_stat_activity AS activity
WHERE activity.datname = current_database() AND activity.usename = current_user
    AND activity.application_name = %(application_name)s
    AND activity.xact_start < clock_timestamp() - make_interval(secs => %(older_than_s)s)
ORDER BY activity.xact_start
"""

# Whatever keeps an old snapshot keeps dead rows everywhere in the database. The age in time is
# hidden from a role without pg_read_all_stats, the age in transactions is not.
HOLD_BACK_VACUUM = """
SELECT format('session pid %%s of %%s (%%s)', pid, usename, application_name) AS who,
    format('SELECT pg_terminate_backend(%%s)', pid) AS cure,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age_s,
    greatest(age(backend_xmin), age(backend_xid)) AS age_transactions
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    AND usename IS NOT NULL
    AND CASE
        WHEN xact_start IS NOT NULL
            THEN xact_start < clock_timestamp() - make_interval(secs => %(older_than_s)s)
        ELSE greatest(age(backend_xmin), age(backend_xid)) > %(older_than_transactions)s
    END
UNION ALL
SELECT format('prepared transaction %%s of %%s', gid, owner),
    format('ROLLBACK PREPARED %%L, or COMMIT PREPARED %%L', gid, gid),
    extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)
FROM pg_prepared_xacts
WHERE database = current_database()
    AND prepared < clock_timestamp() - make_interval(secs => %(older_than_s)s)
UNION ALL
SELECT format('replication slot %%s', slot_name),
    format('SELECT pg_drop_replication_slot(%%L), or start its consumer', slot_name),
    NULL, greatest(age(xmin), age(catalog_xmin))
FROM pg_replication_slots
WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
ORDER BY 4 DESC
LIMIT 10
"""

CONNECTION_LIMITS = """
WITH sessions AS (
    SELECT datname, usename FROM pg_stat_activity WHERE datid IS NOT NULL AND usesysid IS NOT NULL
)
SELECT 'the server (max_connections)' AS whose, (SELECT count(*) FROM sessions) AS used,
    current_setting('max_connections')::integer
    - current_setting('superuser_reserved_connections')::integer
    - coalesce(current_setting('reserved_connections', true)::integer, 0) AS allowed
UNION ALL
SELECT 'the role ' || rolname, (SELECT count(*) FROM sessions WHERE usename = rolname), rolconnlimit
FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0
UNION ALL
SELECT 'the database ' || database.datname,
    (SELECT count(*) FROM sessions WHERE sessions.datname = database.datname), datconnlimit
FROM pg_database AS database WHERE datname = current_database() AND datconnlimit >= 0
"""

# Counted up to a bound: what matters is that there are some, and of which kinds.
DEAD_LETTERS = """
SELECT topic, reason, count(*) AS letters,
    extract(epoch FROM clock_timestamp() - min(first_seen_at))::float8 AS age_s
FROM (SELECT topic, reason, first_seen_at FROM analytics.dead_letters LIMIT 100001) AS letters
GROUP BY topic, reason ORDER BY count(*) DESC, topic, reason LIMIT 20
"""

WAIT_A_SECOND = "SELECT pg_sleep(1)"
