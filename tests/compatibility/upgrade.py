"""`make upgrade-test`: another version beside this one, under load; the upgrade, and the way back.

The old version is the last commit whose pyproject.toml has another version number, or `--from`. It
makes both schemas. Then, while customers book: this version's migrations; relays, each leading from
the other's cursor; workers of both in one group; services of both at once. And back again, all but
the schemas. At the end every place is compared with what the customers were told.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from devstack.__main__ import ending_well
from devstack.processes import ConfigurationError, DevstackError
from devstack.stack import Stack
from devstack.state import REPOSITORY
from devstack.steps import Steps
from tests.compatibility import pages
from tests.compatibility.scene import Scene

GIT = shutil.which("git") or "git"
RESERVATIONS = 600
BROKERS = 1
RESULTS = pages.DOCS / "upgrades.json"
COLUMNS = {
    "from": "old",
    "to": "new",
    "delivery": "delivery",
    "reservations": "reservations",
    "events": "events",
    "lost": "lost",
    "doubled in tables": "doubled_in_tables",
    "doubled in topic": "doubled_in_topic",
    "reordered": "reordered",
    "result": "result",
}


@click.command()
@click.option("--from", "commit", default="", help="default: the last of another version number")
@click.option("--reservations", type=click.IntRange(100, 5_000), default=RESERVATIONS)
def main(commit: str, reservations: int) -> None:
    """Upgrade and roll back under load, by each delivery; exit 1 on any difference."""
    with ending_well(130), Steps() as steps, TemporaryDirectory(prefix="upgrade-") as folder:
        commit = _git("rev-parse", "--short", commit or last_of_another_version()).decode().strip()
        old = Path(folder)
        unpack(commit, old)
        before, after = (version_in(tree / "pyproject.toml") for tree in (old, REPOSITORY))
        rows = []
        for delivery in ("exactly_once", "at_least_once"):
            steps.console.print(f"[bold]{before} ({commit}) and {after}, {delivery}[/]")
            row: dict[str, Any] = {"old": f"{before} ({commit})", "new": after}
            row |= {"delivery": delivery}
            try:
                row |= run(old, delivery, steps, reservations)
                found = problems(row)
            except (DevstackError, TimeoutError) as error:
                steps.console.print(str(error), highlight=False, markup=False)
                found = [str(error).splitlines()[0]]
            rows.append(row | {"result": "; ".join(found) or "agrees"})
            steps.console.print(f"  {json.dumps(rows[-1])}", highlight=False, soft_wrap=True)
        _keep(rows)
    sys.exit(1 if any(row["result"] != "agrees" for row in rows) else 0)


def run(old: Path, delivery: str, steps: Steps, reservations: int) -> dict[str, Any]:
    """Upgrade from the source tree `old` and roll back; return what the audit found.

    Raises:
        DevstackError: a part failed, or a customer saw what no customer should see.
        TimeoutError: it took too long.
    """
    with Stack(BROKERS, steps, tree=old) as stack:
        stack.start()
        with Scene(stack, {"OUTBOX_RELAY_DELIVERY": delivery}) as scene:
            scene.command("reservation_service", "seed-demo", tree=old)
            with steps.step("upgrade under load"):
                _upgrade(scene, old, reservations)
            with steps.step("rollback under load"):
                _roll_back(scene, old, reservations // 2)
            return asdict(scene.audit())


def _upgrade(scene: Scene, old: Path, reservations: int) -> None:
    sweeper = scene.sweeper("old-sweeper", old)
    relay = scene.relay("old-relay", old)
    workers = [scene.worker(f"old-worker-{number}", old) for number in (1, 2)]
    scene.await_said(relay, "leading")
    for worker in workers:
        scene.await_said(worker, "partitions_placed")
    crowd = scene.book(scene.services("old-service", old), reservations)
    crowd.await_booked(0.1)

    for package in ("reservation_service", "data_platform"):  # the schema first
        scene.command(package, "migrate")
    crowd.await_booked(0.2)

    # Each leads once by the cursor that the other has left: stopped, then killed.
    new_relay = scene.relay("relay")
    relay.stop()
    scene.await_said(new_relay, "leading")
    crowd.await_booked(0.3)
    relay = scene.relay("old-relay-again", old)
    new_relay.kill()
    scene.await_said(relay, "leading")
    crowd.await_booked(0.4)
    new_relay = scene.relay("relay-again")
    relay.stop()
    scene.await_said(new_relay, "leading")

    scene.await_said(scene.worker("worker-1"), "partitions_placed")  # three in one group
    crowd.await_booked(0.6)
    workers[0].stop()
    scene.await_said(scene.worker("worker-2"), "partitions_placed")
    workers[1].kill()

    beside = scene.book(scene.services("service"), reservations, seed=2)
    sweeper.stop()
    scene.sweeper("sweeper")
    beside.await_booked(0.5)
    crowd.join()
    for name in ("old-service", "old-service-impatient"):
        scene.parts[name].stop()
    beside.join()


def _roll_back(scene: Scene, old: Path, reservations: int) -> None:
    urls = scene.services("back-service", old)
    crowd = scene.book(urls, reservations, seed=3)
    for name in ("service", "service-impatient", "sweeper"):
        scene.parts[name].stop()
    scene.sweeper("back-sweeper", old)
    crowd.await_booked(0.3)
    for number in (1, 2):
        worker = scene.worker(f"back-worker-{number}", old)
        scene.parts[f"worker-{number}"].stop()
        scene.await_said(worker, "partitions_placed")
    crowd.await_booked(0.6)
    relay = scene.relay("back-relay", old)
    scene.parts["relay-again"].stop()
    scene.await_said(relay, "leading")
    crowd.join()


def problems(row: dict[str, Any]) -> list[str]:
    """What speaks against an upgrade; empty when it is as it must be."""
    found = list(row["differences"])
    wrong = ["lost", "doubled_in_tables", "reordered"]
    if row["delivery"] == "exactly_once":
        wrong.append("doubled_in_topic")
    found += [f"{row[name]} {name}" for name in wrong if row[name]]
    return found if row["events"] else [*found, "nothing was booked"]


def last_of_another_version() -> str:
    """Return the newest commit whose version number isn't the present one.

    Raises:
        ConfigurationError: the history that is here has none.
    """
    changes = _git("log", "--format=%H", "-G^version = ", "--", "pyproject.toml").split()
    ours = version_in(REPOSITORY / "pyproject.toml")
    for change in changes:
        before = subprocess.run(
            [GIT, "show", f"{change.decode()}^:pyproject.toml"],
            cwd=REPOSITORY,
            capture_output=True,
            check=False,
        )
        told = re.search(rb'^version = "(.+)"', before.stdout, re.MULTILINE)
        if told and told[1].decode() != ours:
            return f"{change.decode()}^"
    raise ConfigurationError(f"git: expected a commit of another version than {ours}")


def unpack(commit: str, folder: Path) -> None:
    """Write a commit's files into a folder.

    Raises:
        ConfigurationError: there is no such commit.
    """
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")


def version_in(file: Path) -> str:
    """Return the version number that a pyproject.toml has."""
    return str(tomllib.loads(file.read_text("utf-8"))["project"]["version"])


def _git(*arguments: str) -> bytes:
    done = subprocess.run([GIT, *arguments], cwd=REPOSITORY, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ConfigurationError(f"git {arguments[0]}: {' '.join(said)}")
    return done.stdout


def _keep(rows: list[dict[str, Any]]) -> None:
    """Add these to the results, in the place of older ones of the same commit; write the table."""
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    date = datetime.now(UTC).date().isoformat()
    known = {(row["old"], row["new"], row["delivery"]) for row in rows}
    kept = [row for row in kept if (row["old"], row["new"], row["delivery"]) not in known]
    kept += [row | {"date": date} for row in rows]
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    pages.write("upgrades", table(kept))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    return pages.table({"date": "date"} | COLUMNS, rows)


if __name__ == "__main__":
    main()
