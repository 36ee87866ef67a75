"""Writers as the service has them: pgbench, which takes little of the CPU that others need."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from psycopg.conninfo import conninfo_to_dict

from benchmarks import events
from benchmarks.surroundings import Surroundings
from devstack.postgres import find_installation
from devstack.processes import ConfigurationError, DevstackError, Process

MARGIN_S = 30.0

# pgbench fills in :names, as parameters of prepared statements.
VARIABLES = {
    "topic": events.TOPIC,
    "template_id": events.TEMPLATE_ID,
    "trace": events.TEMPLATE_TRACE,
    "last_template": str(events.TEMPLATES - 1),
}
# One statement that commits by itself.
SINGLE = r"""
\set template random(0, :last_template)
INSERT INTO outbox (topic, key, payload, headers)
SELECT :topic, id,
    replace(replace(payload, :template_id, id), :trace, replace(id, '-', ''))::json,
    replace(headers, :trace, replace(id, '-', ''))::jsonb
FROM bench_events, (SELECT gen_random_uuid()::text AS id) AS new
WHERE template = :template AND version = 1;
"""
# A booking: the reservation's row and its event in one transaction.
BOOKING = r"""
\set template random(0, :last_template)
BEGIN;
SELECT gen_random_uuid() AS reservation \gset
INSERT INTO reservations (reservation_id, customer_id, performance_id, status, version, amount,
                          currency, created_at, updated_at)
VALUES (:reservation::uuid, 'customer', 31, 'confirmed', 1, 17900,
        'EUR', clock_timestamp(), clock_timestamp());
INSERT INTO outbox (topic, key, payload, headers)
SELECT :topic, id,
    replace(replace(payload, :template_id, id), :trace, replace(id, '-', ''))::json,
    replace(headers, :trace, replace(id, '-', ''))::jsonb
FROM bench_events, (SELECT :reservation::text AS id) AS new
WHERE template = :template AND version = 1;
COMMIT;
"""


@dataclass(frozen=True)
class Load:
    """A pgbench that runs."""

    process: Process
    output: Path
    seconds: float

    def finish(self) -> float:
        """Wait for its end and return its transactions per second.

        Raises:
            DevstackError: it failed.
        """
        code = self.process.wait(self.seconds + MARGIN_S)
        found = re.search(r"^tps = ([\d.]+)", self.output.read_text("utf-8"), re.MULTILINE)
        if code or not found:
            raise DevstackError(f"pgbench ended with code {code}\n{self.process.log_tail()}")
        return float(found[1])


def start(
    around: Surroundings,
    *scripts: str,
    clients: int,
    seconds: int,
    rate: int | None = None,
    variables: Mapping[str, str] = MappingProxyType(VARIABLES),
) -> Load:
    """Start writers: as fast as they can, or `rate` a second at random moments (open loop).

    A variable is filled in for its :name; one whose value the script changes is each client's own.

    Raises:
        ConfigurationError: this PostgreSQL has no pgbench.
    """
    program = find_installation().programs / "pgbench"
    if not program.exists():
        raise ConfigurationError("the benchmarks need pgbench: unset DEVSTACK_POSTGRES")
    folder = around.stack.run.path
    options = ["-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-T", str(seconds)]
    options += [f"-D{name}={value}" for name, value in variables.items()]
    options += ["-R", str(rate)] if rate else []
    for number, script in enumerate(scripts):
        path = folder / f"pgbench-{number}.sql"
        path.write_text(script, encoding="ascii")
        options += ["-f", str(path)]
    output = folder / "pgbench.out"
    output.unlink(missing_ok=True)
    process = Process(
        [program, *options],
        log=folder / "pgbench.log",
        stdout=output,
        env=around.stack.child_environment() | _connection(around),
        keep_fds=[around.stack.run.lock_fd],
    )
    return Load(process, output, seconds)


def _connection(around: Surroundings) -> dict[str, str]:
    found = conninfo_to_dict(around.stack.environment["RESERVATION_DATABASE_URL"])
    return {
        variable: str(found[name])
        for variable, name in {
            "PGHOST": "host",
            "PGPORT": "port",
            "PGUSER": "user",
            "PGPASSWORD": "password",
            "PGDATABASE": "dbname",
        }.items()
    }
