"""The statements of `rebuild`: static text; where they need a name, it is an identifier's {place}.

The catalogue's own functions write the definitions that are repeated on the new tables, so what
a later migration adds to them is carried over without being known here.
"""

# The migrations' own lock: neither a migration nor another rebuild may come in between.
TRY_LOCK = "SELECT pg_try_advisory_lock(x'636F6E63657274'::bigint)"

# For work on whole tables. What a worker's session sets for small batches would ruin its plans.
SESSION = """
SELECT
    set_config('idle_in_transaction_session_timeout', '30s', false),
    set_config('statement_timeout', '0', false),
    set_config('lock_timeout', '2s', false),
    set_config('timezone', 'UTC', false),
    set_config('work_mem', '64MB', false),
    set_config('maintenance_work_mem', '256MB', false),
    set_config('enable_hashjoin', 'on', false),
    set_config('enable_mergejoin', 'on', false),
    set_config('enable_seqscan', 'on', false),
    set_config('jit', 'off', false)
"""

# Beside the loader's own: while the offsets are locked, the last records come from Kafka.
LOADING_SESSION = """
SELECT
    set_config('idle_in_transaction_session_timeout', '30s', false),
    set_config('lock_timeout', '1s', false),
    set_config('synchronous_commit', 'on', false)
"""

DROP_SHADOW = "DROP SCHEMA IF EXISTS analytics_rebuild CASCADE"
CREATE_SHADOW = "CREATE SCHEMA analytics_rebuild"

# Every table that a worker writes; where it stands in Kafka stays as it is.
TABLES = """
SELECT
    relname,
    (SELECT array_agg(attname ORDER BY attnum) FROM pg_attribute
     WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped),
    (SELECT array_agg(attname ORDER BY ordinality)
     FROM pg_index, unnest(indkey) WITH ORDINALITY AS key (number, ordinality)
     JOIN pg_attribute ON attnum = key.number
     WHERE indrelid = pg_class.oid AND indisprimary AND attrelid = pg_class.oid),
    (SELECT array_agg(format_type(atttypid, atttypmod) ORDER BY ordinality)
     FROM pg_index, unnest(indkey) WITH ORDINALITY AS key (number, ordinality)
     JOIN pg_attribute ON attnum = key.number
     WHERE indrelid = pg_class.oid AND indisprimary AND attrelid = pg_class.oid)
FROM pg_class
WHERE relnamespace = 'analytics'::regnamespace AND relkind IN ('r', 'p')
    AND relname <> 'load_offsets'
ORDER BY array_position(ARRAY['fct_reservation_events', 'fct_reservations', 'fct_reservation_seats',
    'dim_concerts', 'dim_performances', 'dead_letters'], relname::text), relname
"""

# What would be lost by a change of tables, or keep one from happening: said before the work begins.
OBSTACLES = """
WITH tables AS (
    SELECT * FROM pg_class
    WHERE relnamespace = 'analytics'::regnamespace AND relkind IN ('r', 'p')
        AND relname <> 'load_offsets'
)
SELECT format('table %s is not ours', relname) FROM tables
WHERE pg_get_userbyid(relowner) <> current_user
UNION ALL
SELECT format('table %s is partitioned, inherits or has row security', relname) FROM tables
WHERE relkind = 'p' OR relrowsecurity
    OR EXISTS (SELECT FROM pg_inherits WHERE tables.oid IN (inhrelid, inhparent))
UNION ALL
SELECT format('table %s has no primary key', relname) FROM tables
WHERE NOT EXISTS (SELECT FROM pg_index WHERE indrelid = tables.oid AND indisprimary)
UNION ALL
SELECT format('trigger %s on %s', tgname, relname)
FROM pg_trigger JOIN tables ON tgrelid = tables.oid
UNION ALL
SELECT format('statistics %s on %s', stxname, relname)
FROM pg_statistic_ext JOIN tables ON stxrelid = tables.oid
UNION ALL
SELECT format('publication %s of %s', pubname, relname)
FROM pg_publication_rel JOIN pg_publication ON pg_publication.oid = prpubid
JOIN tables ON prrelid = tables.oid
UNION ALL
SELECT format('foreign key %s of %s', conname, conrelid::regclass) FROM pg_constraint
WHERE contype = 'f' AND (conrelid IN (SELECT oid FROM tables) OR confrelid IN
    (SELECT oid FROM tables))
UNION ALL
SELECT DISTINCT format('%s depends on %s',
    pg_describe_object(pg_depend.classid, pg_depend.objid, pg_depend.objsubid), tables.relname)
FROM pg_depend JOIN tables ON refobjid = tables.oid
LEFT JOIN pg_rewrite ON classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = objid
LEFT JOIN pg_class AS dependent ON dependent.oid = ev_class
WHERE refclassid = 'pg_class'::regclass AND deptype = 'n'
    AND classid NOT IN ('pg_constraint'::regclass, 'pg_policy'::regclass,
        'pg_publication_rel'::regclass, 'pg_trigger'::regclass)
    AND NOT coalesce(
        dependent.relkind = 'v' AND pg_get_userbyid(dependent.relowner) = current_user, false)
"""

# LIKE copies columns, defaults, NOT NULL and CHECK constraints with their names and comments.
CREATE_TABLE = """
CREATE TABLE analytics_rebuild.{table} (
    LIKE analytics.{table} INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS
)
"""

# Keys first: the loader's statements rest on them.
KEYS = """
SELECT format('ALTER TABLE analytics_rebuild.%%I ADD CONSTRAINT %%I %%s',
    relname, conname, pg_get_constraintdef(pg_constraint.oid))
FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
WHERE conrelid = ('analytics.' || quote_ident(%(table)s))::regclass AND contype IN ('p', 'u', 'x')
ORDER BY contype, conname
"""

# Made when the tables are full, which is cheaper.
INDEXES = """
SELECT replace(
    pg_get_indexdef(indexrelid),
    format(' ON analytics.%%I ', relname), format(' ON analytics_rebuild.%%I ', relname))
FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
WHERE indrelid = ('analytics.' || quote_ident(%(table)s))::regclass AND indisvalid
    AND NOT EXISTS (SELECT FROM pg_constraint
        WHERE conindid = indexrelid AND contype IN ('p', 'u', 'x'))
ORDER BY indexrelid
"""

# The rest of a table's definition: storage, comments, rights. Rights that the new table has by
# default privileges are taken away first.
PROPERTIES = """
WITH old AS (
    SELECT * FROM pg_class WHERE oid = ('analytics.' || quote_ident(%(table)s))::regclass
),
new AS (
    SELECT * FROM pg_class WHERE oid = ('analytics_rebuild.' || quote_ident(%(table)s))::regclass
)
SELECT format('ALTER TABLE analytics_rebuild.%%I SET (%%s)', relname,
    array_to_string(reloptions, ', '))
FROM old WHERE reloptions IS NOT NULL
UNION ALL
SELECT format('COMMENT ON TABLE analytics_rebuild.%%I IS %%L', relname,
    obj_description(oid, 'pg_class'))
FROM old WHERE obj_description(oid, 'pg_class') IS NOT NULL
UNION ALL
SELECT format('COMMENT ON INDEX analytics_rebuild.%%I IS %%L', kind.relname,
    obj_description(indexrelid, 'pg_class'))
FROM old JOIN pg_index ON indrelid = old.oid JOIN pg_class AS kind ON kind.oid = indexrelid
WHERE obj_description(indexrelid, 'pg_class') IS NOT NULL
UNION ALL
SELECT format('COMMENT ON CONSTRAINT %%I ON analytics_rebuild.%%I IS %%L', conname, old.relname,
    obj_description(pg_constraint.oid, 'pg_constraint'))
FROM old JOIN pg_constraint ON conrelid = old.oid
WHERE obj_description(pg_constraint.oid, 'pg_constraint') IS NOT NULL
UNION ALL
SELECT format('REVOKE ALL ON analytics_rebuild.%%I FROM %%s', relname, grantee_name)
FROM (
    SELECT DISTINCT relname, CASE grantee WHEN 0 THEN 'PUBLIC'
        ELSE quote_ident(pg_get_userbyid(grantee)) END AS grantee_name
    FROM new CROSS JOIN aclexplode(relacl) WHERE grantee <> relowner
) AS by_default
UNION ALL
SELECT format('GRANT %%s ON analytics_rebuild.%%I TO %%s%%s', privilege_type, relname,
    CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
    CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM (
    SELECT relname, grant_of.* FROM old
    CROSS JOIN aclexplode(relacl) WITH ORDINALITY AS grant_of
    WHERE grant_of.grantee <> relowner ORDER BY ordinality
) AS on_table
UNION ALL
SELECT format('GRANT %%s (%%I) ON analytics_rebuild.%%I TO %%s%%s', privilege_type, attname,
    old.relname, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
    CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
FROM old JOIN pg_attribute ON attrelid = old.oid AND NOT attisdropped CROSS JOIN aclexplode(attacl)
"""

# A row that comes out as it was keeps the time at which it was loaded.
KEEP_FUNCTION = """
CREATE FUNCTION analytics_rebuild.{function}() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before timestamptz;
BEGIN
    SELECT stored.loaded_at INTO before FROM analytics.{table} AS stored
    WHERE {stored_is_new} AND ROW({stored_columns}) IS NOT DISTINCT FROM ROW({new_columns});
    IF FOUND THEN
        NEW.loaded_at := before;
    END IF;
    RETURN NEW;
END
$$
"""
KEEP_TRIGGER = """
CREATE TRIGGER keep_loaded_at BEFORE INSERT OR UPDATE ON analytics_rebuild.{table}
FOR EACH ROW EXECUTE FUNCTION analytics_rebuild.{function}()
"""
DROP_TRIGGER = "DROP TRIGGER keep_loaded_at ON analytics_rebuild.{table}"
VACUUM = "VACUUM (ANALYZE) analytics_rebuild.{table}"

DIFFERING = """
SELECT {either_key}
FROM analytics_rebuild.{table} AS made
FULL JOIN analytics.{table} AS stored ON {stored_is_made}
WHERE ROW({made_columns}) IS DISTINCT FROM ROW({stored_columns})
LIMIT %s
"""
STILL_DIFFERING = """
SELECT {either_key}, to_jsonb(made), to_jsonb(stored)
FROM unnest({wanted_arrays}) AS wanted ({key})
LEFT JOIN analytics_rebuild.{table} AS made ON {made_is_wanted}
LEFT JOIN analytics.{table} AS stored ON {stored_is_wanted}
WHERE ROW({made_columns}) IS DISTINCT FROM ROW({stored_columns})
"""

# Workers lock their offset rows first of all, and claim new ones. From here on none of them is
# within a load, and readers notice nothing.
LOCK_OFFSETS = "LOCK TABLE analytics.load_offsets IN EXCLUSIVE MODE"
# A replay locks its letters first.
LOCK_LETTERS = "LOCK TABLE analytics.dead_letters IN EXCLUSIVE MODE"
LOCK_TABLE = "LOCK TABLE analytics.{table} IN ACCESS EXCLUSIVE MODE"

VIEWS = """
SELECT DISTINCT format('CREATE OR REPLACE VIEW %%s%%s AS %%s', view.oid::regclass,
    ' WITH (' || array_to_string(view.reloptions, ', ') || ')', pg_get_viewdef(view.oid))
FROM pg_depend
JOIN pg_rewrite ON classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = objid
JOIN pg_class AS view ON view.oid = ev_class AND view.relkind = 'v'
WHERE refclassid = 'pg_class'::regclass
    AND refobjid = ANY (ARRAY(
        SELECT ('analytics.' || quote_ident(name))::regclass::oid
        FROM unnest(%(tables)s::text[]) AS name))
"""
CREATE_REPLACED = "CREATE SCHEMA analytics_replaced"
MOVE_AWAY = "ALTER TABLE analytics.{table} SET SCHEMA analytics_replaced"
MOVE_IN = "ALTER TABLE analytics_rebuild.{table} SET SCHEMA analytics"
# No CASCADE: what nobody knew of keeps the whole change from happening.
DROP_REPLACED_TABLE = "DROP TABLE analytics_replaced.{table}"
DROP_REPLACED = "DROP SCHEMA analytics_replaced"

# Letters whose record was read again and is good by now. One whose record the topic no longer has
# (a compacted one drops what has been replaced) is all that is left of it, and stays.
CREATE_GOOD_LETTERS = """
CREATE TEMPORARY TABLE good_letters (
    topic text, kafka_partition integer, kafka_offset bigint,
    PRIMARY KEY (topic, kafka_partition, kafka_offset)
)
"""
LETTERS_BETWEEN = """
SELECT kafka_offset FROM analytics.dead_letters
WHERE topic = %(topic)s AND kafka_partition = %(partition)s
    AND kafka_offset >= %(first)s AND kafka_offset < %(end)s
"""
ADD_GOOD_LETTERS = """
INSERT INTO pg_temp.good_letters
SELECT %(topic)s, %(partition)s, unnest(%(offsets)s::bigint[]) ON CONFLICT DO NOTHING
"""
DELETE_LETTERS = """
DELETE FROM analytics.dead_letters AS stored USING pg_temp.good_letters AS good
WHERE stored.topic = good.topic AND stored.kafka_partition = good.kafka_partition
    AND stored.kafka_offset = good.kafka_offset
RETURNING stored.topic, stored.kafka_partition, stored.kafka_offset, stored.reason
"""
ADD_LETTERS = """
INSERT INTO analytics.dead_letters SELECT * FROM analytics_rebuild.dead_letters
ON CONFLICT (topic, kafka_partition, kafka_offset) DO NOTHING
RETURNING topic, kafka_partition, kafka_offset, reason
"""

COUNT_LETTERS = "SELECT count(*) FROM analytics_rebuild.dead_letters"
