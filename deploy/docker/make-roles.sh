#!/bin/bash
# Makes a database's owner and roles with the passwords in /run/secrets/db, and the database.
# The Postgres image runs it on an empty volume; run it again after a password has changed.
set -euo pipefail

: "${DATABASE:?the database to make}" "${OWNER:?its owner}" "${ROLES:?the other roles that log in}"

sql() { psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username postgres --dbname postgres "$@"; }

for role in postgres "$OWNER" $ROLES; do
  # Read by psql itself: an argument could be seen in the list of processes.
  sql --set role="$role" <<SQL
\set password \`cat /run/secrets/db/$role\`
SELECT format('CREATE ROLE %I LOGIN', :'role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role') \gexec
SELECT format('ALTER ROLE %I PASSWORD %L', :'role', :'password') \gexec
SQL
done
sql --set database="$DATABASE" --set owner="$OWNER" <<'SQL'
SELECT format('CREATE DATABASE %I OWNER %I', :'database', :'owner')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'database') \gexec
SQL
