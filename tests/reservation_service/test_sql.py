"""Every statement fits the real schema and the service's rights."""

import re

from reservation_service import outbox, sql
from tests.reservation_service.house import House

STATEMENTS = {name: text for name, text in vars(sql).items() if name.isupper()}
STATEMENTS["INSERT_EVENT"] = outbox.INSERT


def test_every_statement_can_be_prepared_and_the_service_may_run_it(house: House) -> None:
    assert len(STATEMENTS) > 20
    with house.connect() as connection:
        for name, text in STATEMENTS.items():
            prepared, parameters = numbered(text)
            connection.execute(f"PREPARE {name} AS {prepared}".encode())
            # EXPLAIN asks for the rights too, without doing it.
            nothing = ", ".join(["NULL"] * len(parameters))
            execute = f"EXECUTE {name} ({nothing})" if parameters else f"EXECUTE {name}"
            connection.execute(f"EXPLAIN {execute}".encode())


def numbered(text: str) -> tuple[str, list[str]]:
    """Return the statement with $1, $2 … instead of names, and the names in that order."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    return re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", text), names


def test_the_service_can_neither_change_nor_read_events(house: House) -> None:
    with house.connect() as connection:
        rights = connection.execute(
            "SELECT has_table_privilege('outbox', right_) FROM unnest(ARRAY["
            "'SELECT', 'UPDATE', 'DELETE', 'TRUNCATE']) AS right_"
        ).fetchall()
    assert rights == [(False,)] * 4
