-- The outbox for a service of your own: all that `outbox-relay` needs in a PostgreSQL database (15 or newer).
-- Run it once, as the role that owns your tables: psql --single-transaction --file outbox.sql
-- See docs/adopt.md. A test runs it in an empty database, and compares it with the product's own migrations.

DO $$
BEGIN
    IF to_regrole('outbox_relay') IS NULL THEN
        CREATE ROLE outbox_relay LOGIN;
    END IF;
END
$$;

CREATE TABLE outbox_topics (
    topic text PRIMARY KEY CHECK (topic ~ '^[a-zA-Z0-9._-]{1,249}$'),
    max_bytes integer NOT NULL CHECK (max_bytes > 0)
);
COMMENT ON TABLE outbox_topics IS
    'Topics that may be published; max_bytes bounds key + payload + headers of one record.';

CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    topic text NOT NULL,
    key text NOT NULL CONSTRAINT outbox_key_is_given CHECK (key <> ''),
    payload json NOT NULL,
    headers jsonb NOT NULL DEFAULT '{}' CONSTRAINT outbox_headers_are_texts CHECK (
        jsonb_typeof(headers) = 'object'
        AND NOT jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")')
    ),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
) PARTITION BY RANGE (id);
ALTER TABLE outbox
    ALTER COLUMN payload SET STORAGE EXTERNAL,
    ALTER COLUMN headers SET STORAGE EXTERNAL,
    ALTER COLUMN key SET STORAGE EXTERNAL;
CREATE INDEX outbox_by_transaction ON outbox (transaction_id);
COMMENT ON TABLE outbox IS
    'Events in the transaction of the change they tell of. Append-only: never updated.';
COMMENT ON COLUMN outbox.transaction_id IS
    'The writing transaction, by which the relay tells committed from in-flight rows.';
COMMENT ON COLUMN outbox.payload IS 'The record''s value, published byte for byte.';
COMMENT ON COLUMN outbox.headers IS 'The record''s headers as {"name": "text"}.';

-- What could never be published fails here, in the writer's transaction, where somebody can still
-- do something about it; behind the commit it could only block its key.
CREATE FUNCTION outbox_refuse_unpublishable() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    allowed_bytes integer;
    wanted_bytes bigint;
BEGIN
    -- Whoever inserts: an xid of somebody's choice would hide the row from the relay.
    NEW.transaction_id := pg_current_xact_id();
    -- Drivers send NULL for "none".
    NEW.headers := coalesce(NEW.headers, '{}');
    SELECT max_bytes INTO allowed_bytes FROM public.outbox_topics WHERE topic = NEW.topic;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'outbox: topic "%" is not in outbox_topics', NEW.topic
            USING ERRCODE = 'check_violation', TABLE = 'outbox', CONSTRAINT = 'outbox_topic_known';
    END IF;
    wanted_bytes := octet_length(NEW.key) + octet_length(NEW.payload::text)
        + octet_length(NEW.headers::text);
    IF wanted_bytes > allowed_bytes THEN
        RAISE EXCEPTION 'outbox: record of % bytes, topic "%" takes %',
                wanted_bytes, NEW.topic, allowed_bytes
            USING ERRCODE = 'check_violation', TABLE = 'outbox', CONSTRAINT = 'outbox_record_fits';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER outbox_refuse_unpublishable BEFORE INSERT ON outbox
    FOR EACH ROW EXECUTE FUNCTION outbox_refuse_unpublishable();

CREATE TABLE outbox_0 PARTITION OF outbox FOR VALUES FROM (0) TO (10000000000);
CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM (10000000000) TO (20000000000);
CREATE TABLE outbox_2 PARTITION OF outbox FOR VALUES FROM (20000000000) TO (30000000000);
CREATE TABLE outbox_default PARTITION OF outbox DEFAULT;

CREATE VIEW outbox_partitions AS
SELECT substr(relname, length('outbox_') + 1)::bigint AS number, pg_class.oid AS relation
FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
WHERE inhparent = 'public.outbox'::regclass AND relname ~ '^outbox_[0-9]+$';
COMMENT ON VIEW outbox_partitions IS
    'The outbox''s partitions without the default one: number n has the ids from n * 10^10 on.';

-- The relay's own tables: how far it is, and what Kafka has refused.
CREATE TABLE outbox_relay_cursor (
    relay_name text NOT NULL,
    topic text NOT NULL,
    delivery text NOT NULL CHECK (delivery IN ('at_least_once', 'exactly_once')),
    leader_epoch bigint NOT NULL CHECK (leader_epoch >= 1),
    leader text NOT NULL,
    generation integer NOT NULL DEFAULT 1 CHECK (generation >= 1),
    sequence bigint NOT NULL DEFAULT 0 CHECK (sequence >= 0),
    published_snapshot pg_snapshot NOT NULL,
    batch_snapshot pg_snapshot,
    batch_last_id bigint,
    system_identifier bigint NOT NULL,
    database_oid oid NOT NULL,
    timeline text NOT NULL,
    wal_lsn pg_lsn NOT NULL,
    kafka_cluster_id text,
    published_rows bigint NOT NULL DEFAULT 0,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (relay_name, topic),
    CHECK ((batch_snapshot IS NULL) = (batch_last_id IS NULL))
) WITH (fillfactor = 50);
COMMENT ON TABLE outbox_relay_cursor IS
    'How far each relay has published each topic: all rows visible in published_snapshot, and of '
    'those visible in batch_snapshot the ones up to batch_last_id.';

CREATE TABLE outbox_relay_quarantine (
    relay_name text NOT NULL,
    id bigint NOT NULL,
    topic text NOT NULL,
    key text NOT NULL,
    payload json NOT NULL,
    headers jsonb NOT NULL,
    error text,
    quarantined_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    released_at timestamptz,
    PRIMARY KEY (relay_name, id)
);
ALTER TABLE outbox_relay_quarantine
    ALTER COLUMN payload SET STORAGE EXTERNAL,
    ALTER COLUMN headers SET STORAGE EXTERNAL;
CREATE INDEX outbox_relay_quarantine_by_key ON outbox_relay_quarantine (relay_name, topic, key, id);
COMMENT ON TABLE outbox_relay_quarantine IS
    'Events that Kafka refused for themselves, and those behind them with the same key, in order.';
COMMENT ON COLUMN outbox_relay_quarantine.error IS
    'What Kafka said of the event; NULL: it only waits behind an earlier one of its key.';
COMMENT ON COLUMN outbox_relay_quarantine.released_at IS
    'When an operator asked to try it again; the leader publishes it and deletes the row.';

-- What the relay, which doesn't own the outbox, may do to its partitions. Each function keeps every row
-- that isn't published, and gives up waiting for a lock after 50 ms.
-- The partition to make next. At least a whole partition's ids lie between it and the sequence, so
-- that nobody has drawn one of its ids, or will until it is attached.
CREATE FUNCTION outbox_next_partition() RETURNS bigint LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $$
    SELECT greatest(last_value / 10000000000 + 2,
                    (SELECT max(number) + 1 FROM public.outbox_partitions))
    FROM public.outbox_id_seq
$$;

-- Returns the number of the new partition. NULL: two are ahead already, or the default partition
-- must be fenced before, because ATTACH would read all of it, locked.
-- Made first and attached then: CREATE ... PARTITION OF locks everybody out of the outbox.
CREATE FUNCTION outbox_add_partition() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    ids_per_partition CONSTANT bigint := 10000000000;
    added bigint;
    fence name;
BEGIN
    LOCK TABLE ONLY public.outbox IN SHARE UPDATE EXCLUSIVE MODE;
    added := public.outbox_next_partition();
    IF (SELECT count(*) FROM public.outbox_partitions, public.outbox_id_seq
        WHERE number > last_value / ids_per_partition) >= 2
    THEN
        RETURN NULL;
    END IF;
    LOCK TABLE ONLY public.outbox_default IN ACCESS EXCLUSIVE MODE;
    IF pg_relation_size('public.outbox_default') > 0 AND NOT EXISTS (
        SELECT FROM pg_constraint WHERE conrelid = 'public.outbox_default'::regclass
            AND conname = 'outbox_ids_below_partition_' || added AND convalidated)
    THEN
        RETURN NULL;
    END IF;
    EXECUTE format('CREATE TABLE public.outbox_%s (LIKE public.outbox INCLUDING DEFAULTS'
        ' INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING INDEXES)', added);
    EXECUTE format('ALTER TABLE public.outbox ATTACH PARTITION public.outbox_%s'
        ' FOR VALUES FROM (%s) TO (%s)',
        added, added * ids_per_partition, (added + 1) * ids_per_partition);
    FOR fence IN SELECT conname FROM pg_constraint
        WHERE conrelid = 'public.outbox_default'::regclass
            AND conname LIKE 'outbox_ids_below_partition_%'
    LOOP
        EXECUTE format('ALTER TABLE public.outbox_default DROP CONSTRAINT %I', fence);
    END LOOP;
    RETURN added;
END
$$;

-- Prepares a default partition with rows for outbox_add_partition: a CHECK that it has no row of
-- the next partition. Called twice: the first call declares it, the second one reads the rows, in
-- nobody's way. True when it is done.
CREATE FUNCTION outbox_fence_default() RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    ids_per_partition CONSTANT bigint := 10000000000;
    next_number bigint;
    fence name;
BEGIN
    LOCK TABLE ONLY public.outbox IN SHARE UPDATE EXCLUSIVE MODE;
    next_number := public.outbox_next_partition();
    fence := 'outbox_ids_below_partition_' || next_number;
    IF EXISTS (SELECT FROM pg_constraint
        WHERE conrelid = 'public.outbox_default'::regclass AND conname = fence)
    THEN
        EXECUTE format('ALTER TABLE public.outbox_default VALIDATE CONSTRAINT %I', fence);
        RETURN true;
    END IF;
    EXECUTE format('ALTER TABLE public.outbox_default ADD CONSTRAINT %I CHECK (id < %s) NOT VALID',
        fence, next_number * ids_per_partition);
    RETURN false;
END
$$;

-- Ends the partition that the sequence stands in, which must be from_number: the next row goes into
-- the next one. Returns its number; NULL: somebody was quicker, or there is none.
CREATE FUNCTION outbox_roll_over(from_number bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    ids_per_partition CONSTANT bigint := 10000000000;
    next_number bigint;
BEGIN
    LOCK TABLE ONLY public.outbox IN SHARE UPDATE EXCLUSIVE MODE;
    SELECT min(number) INTO next_number
    FROM public.outbox_partitions, public.outbox_id_seq
    WHERE last_value / ids_per_partition = from_number AND number > from_number;
    PERFORM setval('public.outbox_id_seq', next_number * ids_per_partition, false)
    WHERE next_number IS NOT NULL;
    RETURN next_number;
END
$$;

-- Says which cursor a partition (NULL: the default one) must stay for; NULL: every row in it is
-- published, visible in the snapshot of every relay's cursor for every topic. A topic without a
-- cursor is one of which a relay has published nothing yet.
-- By the index on transaction_id, or a check of a published partition would read all of it.
CREATE FUNCTION outbox_kept_for(number bigint) RETURNS text LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    partition CONSTANT text := 'outbox_' || coalesce(number::text, 'default');
    kept_for text;
BEGIN
    IF NOT EXISTS (SELECT FROM public.outbox_relay_cursor) THEN
        RETURN 'no relay has run';
    END IF;
    SELECT format('relay %s, topic %s', relay_name, topic) INTO kept_for FROM (
        SELECT relay_name, outbox_topics.topic
        FROM public.outbox_topics, (SELECT DISTINCT relay_name FROM public.outbox_relay_cursor) AS r
        EXCEPT SELECT relay_name, topic FROM public.outbox_relay_cursor) AS missing LIMIT 1;
    IF kept_for IS NOT NULL THEN
        RETURN kept_for;
    END IF;
    EXECUTE format(
        'SELECT format(''relay %%s, topic %%s'', relay_name, topic)'
        ' FROM public.outbox_relay_cursor AS stored WHERE'
        ' EXISTS (SELECT FROM public.%1$I'
        '     WHERE transaction_id >= pg_snapshot_xmax(stored.published_snapshot))'
        ' OR EXISTS (SELECT FROM public.%1$I WHERE transaction_id = ANY ('
        '     ARRAY(SELECT pg_snapshot_xip(stored.published_snapshot))))'
        ' ORDER BY 1 LIMIT 1',
        partition) INTO kept_for;
    RETURN kept_for;
END
$$;

-- Empties a partition (NULL: the default one) in which every row is published. The lock waits for
-- writers in flight, whose rows are seen only afterwards: the first look is not to lock in vain.
-- Bookings write elsewhere and don't notice.
CREATE FUNCTION outbox_empty_partition(number bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    partition CONSTANT text := 'outbox_' || coalesce(number::text, 'default');
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox_empty_partition: wants READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    LOCK TABLE ONLY public.outbox IN SHARE UPDATE EXCLUSIVE MODE;
    IF number IS NOT NULL AND NOT EXISTS (
        SELECT FROM public.outbox_partitions AS p WHERE p.number = outbox_empty_partition.number)
    THEN
        RETURN false;
    END IF;
    IF public.outbox_kept_for(number) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE ONLY public.%I IN ACCESS EXCLUSIVE MODE', partition);
    IF public.outbox_kept_for(number) IS NOT NULL THEN
        RETURN false;
    END IF;
    IF pg_relation_size(format('public.%I', partition)::regclass) > 0 THEN
        EXECUTE format('TRUNCATE ONLY public.%I', partition);
    END IF;
    RETURN true;
END
$$;

-- Drops an emptied partition that the sequence has left behind. The lock on the whole outbox is
-- held for a look at a file's size, the drop and the commit.
CREATE FUNCTION outbox_drop_partition(number bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $$
DECLARE
    ids_per_partition CONSTANT bigint := 10000000000;
BEGIN
    LOCK TABLE ONLY public.outbox IN ACCESS EXCLUSIVE MODE;
    IF NOT EXISTS (
        SELECT FROM public.outbox_partitions AS p, public.outbox_id_seq
        WHERE p.number = outbox_drop_partition.number
            AND p.number < last_value / ids_per_partition
            AND pg_relation_size(p.relation) = 0)
    THEN
        RETURN false;
    END IF;
    EXECUTE format('DROP TABLE public.outbox_%s', number);
    RETURN true;
END
$$;

GRANT SELECT ON outbox_topics TO outbox_relay;
GRANT SELECT ON outbox, outbox_default, outbox_partitions, outbox_id_seq TO outbox_relay;
REVOKE ALL ON FUNCTION outbox_add_partition, outbox_fence_default, outbox_roll_over,
    outbox_kept_for, outbox_empty_partition, outbox_drop_partition FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_add_partition, outbox_fence_default, outbox_roll_over,
    outbox_kept_for, outbox_empty_partition, outbox_drop_partition TO outbox_relay;
GRANT SELECT, INSERT, UPDATE ON outbox_relay_cursor TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay_quarantine TO outbox_relay;
