"""The command line: exit codes, clear errors, secrets from files, demo data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

from tests.databases import ReservationDatabase
from tests.reservation_service.house import SECRET_KEY, House

CUSTOMER_SEATS = "RESERVATION_MAX_SEATS_PER_CUSTOMER"
COMMANDS = ["serve", "migrate", "expire-holds", "seed-demo", "token"]
TIMEOUT_S = 60


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")}
    return subprocess.run(
        [sys.executable, "-m", "reservation_service", *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def available_in_a_first_performance(house: House) -> int:
    rows = house.execute(
        """
        SELECT count(*) AS seats FROM seats
        JOIN (
            SELECT DISTINCT ON (concert_id) * FROM performances ORDER BY concert_id, starts_at
        ) AS p USING (performance_id)
        WHERE NOT blocked AND claimed_until IS NULL
            AND p.status = 'scheduled' AND p.sales_open_at < now() AND p.sales_close_at > now()
        GROUP BY performance_id ORDER BY 1 DESC LIMIT 1
        """
    )
    return int(rows[0]["seats"]) if rows else 0


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_configuration(arguments: list[str]) -> None:
    done = run(*arguments, RESERVATION_HOLD_SECONDS="nonsense")
    assert done.returncode == 0
    assert "Usage: reservation-service" in done.stdout


def test_the_version_is_told() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.search(r"\d+\.\d+\.\d+", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["token", "ann"], {}, "RESERVATION_SECRET_KEY"),
        (["token", "ann"], {"RESERVATION_SECRET_KEY": ""}, "RESERVATION_SECRET_KEY"),
        (["token", "ann"], {"RESERVATION_SECRET_KEY": "x" * 31}, "RESERVATION_SECRET_KEY"),
        (["serve"], {"RESERVATION_SECRET_KEY": SECRET_KEY}, "RESERVATION_DATABASE_URL"),
        (["serve"], {"RESERVATION_DATABASE_URL": "postgresql://x"}, "RESERVATION_SECRET_KEY"),
        (["migrate"], {}, "RESERVATION_OWNER_DATABASE_URL"),
        (["seed-demo"], {}, "RESERVATION_DATABASE_URL"),
        (["expire-holds"], {}, "RESERVATION_DATABASE_URL"),
        (["expire-holds"], {"LOG_LEVEL": "loud"}, "LOG_LEVEL"),
        (["serve"], {"RESERVATION_HOLD_SECONDS": "0"}, "RESERVATION_HOLD_SECONDS"),
        (["serve"], {CUSTOMER_SEATS: "3000000000"}, CUSTOMER_SEATS),
        (["serve"], {"RESERVATION_DATABASE_URL": "hunter2"}, "RESERVATION_DATABASE_URL"),
        (["serve"], {"RESERVATION_SECRET_KEY_FILE": "/nowhere"}, "RESERVATION_SECRET_KEY_FILE"),
    ],
)
def test_wrong_configuration_is_one_line_and_exit_code_2(
    arguments: list[str], environment: dict[str, str], named: str
) -> None:
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert named in line
    assert "x" * 31 not in line


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["token"], ["token", "a b"], ["serve", "--port", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = run(*arguments, RESERVATION_SECRET_KEY=SECRET_KEY)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert arguments[-1] in line or "CUSTOMER_ID" in line


def test_a_database_that_is_away_is_one_line_and_exit_code_1() -> None:
    url = "postgresql://somebody:secret@127.0.0.1:1/nothing"
    for command in ("seed-demo", "expire-holds", "migrate"):
        done = run(command, RESERVATION_DATABASE_URL=url, RESERVATION_OWNER_DATABASE_URL=url)
        assert done.returncode == 1, command
        (line,) = done.stderr.splitlines()
        assert "secret" not in line


def test_token_prints_the_token_alone(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{SECRET_KEY}\n")
    done = run("token", "ann", RESERVATION_SECRET_KEY_FILE=str(file))
    assert done.returncode == 0
    claims = jwt.decode(
        done.stdout.strip(), SECRET_KEY, algorithms=["HS256"], audience="reservation-service"
    )
    assert claims["sub"] == "ann"


def test_migrate_and_seed_demo_may_be_run_twice(reservation_database: ReservationDatabase) -> None:
    url, owner = reservation_database.service_url, reservation_database.owner_url
    for _ in range(2):
        assert run("migrate", RESERVATION_OWNER_DATABASE_URL=owner).returncode == 0
        assert run("seed-demo", RESERVATION_DATABASE_URL=url).returncode == 0


def test_seed_demo_leaves_something_to_book_and_adds_more_only_when_sold_out(house: House) -> None:
    url = house.database.service_url
    counts = []
    for _ in range(2):
        assert run("seed-demo", RESERVATION_DATABASE_URL=url).returncode == 0
        counts.append(house.execute("SELECT count(*) AS n FROM concerts")[0]["n"])
    assert available_in_a_first_performance(house) >= 5_000
    house.execute("UPDATE seats SET reservation_id = gen_random_uuid(), claimed_until = 'infinity'")
    assert available_in_a_first_performance(house) == 0
    assert run("seed-demo", RESERVATION_DATABASE_URL=url).returncode == 0
    counts.append(house.execute("SELECT count(*) AS n FROM concerts")[0]["n"])
    assert counts == [4, 4, 7]
    assert available_in_a_first_performance(house) >= 200
    assert len(house.events("concert-catalogue")) == 7


def test_expire_holds_sweeps_once_and_ends(house: House) -> None:
    done = run("expire-holds", RESERVATION_DATABASE_URL=house.database.service_url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
