"""`make systemd-test`: install on a real systemd; kill, freeze, starve, upgrade, reboot, uninstall.

Somebody books all the while. At the end every booking that a customer was told of has to be in the
analysts' tables, and `data-platform reconcile` has to agree. The units are the shipped ones; only
ports, and the watchdogs' patience, are others.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg

from devstack.__main__ import ending_well
from devstack.application import get_json
from devstack.processes import ConfigurationError, DevstackError, succeed, wait_until
from devstack.stack import COMMAND_TIMEOUT_S, Stack
from devstack.state import REPOSITORY, free_port
from devstack.steps import Steps
from tests.systemd.box import Box
from tests.systemd.load import Load

ETC = "/etc/opt/concert-reservation"
UNITS = "/etc/systemd/system"
INSTALL_TIMEOUT_S = 300.0
SETTLE_TIMEOUT_S = 90.0
OUTAGE_S = 30.0
WATCHDOG_S = 20
EXPOSURE_MAX = 2.0
RELAY, SERVICE = "outbox-relay.service", "reservation-service.service"
WORKERS = [f"data-platform-worker@{number}.service" for number in (1, 2, 3)]
IN_ORDER = [RELAY, *WORKERS, SERVICE]
ONCE = ["reservation-service-expire-holds.service", "concert-reservation-migrate.service"]
LOADED = "SELECT reservation_id, status FROM analytics.fct_reservations"
LOOK = """
systemctl --no-pager --all list-units 'outbox*' 'data-pl*' '*reserv*'
journalctl --no-pager --lines=80 --output=short-monotonic
"""
# What the oldest systemd we support doesn't know yet, and says so.
NEWER = re.compile(r"Unknown key '(RestartSteps|RestartMaxDelaySec)'")


class Scene:
    """The box with everything in it, and whoever books."""

    def __init__(self, box: Box, stack: Stack, wheels: list[str]) -> None:
        self.box = box
        self.stack = stack
        self.wheels = wheels
        self.port = free_port()

    def install(self, wheel: str, *, code: int = 0) -> str:
        """Run install.sh as an operator does; return what it said."""
        return self.box(
            "bash", "/mnt/deploy/install.sh", "--wheels", "/mnt/wheels", f"/mnt/dist/{wheel}",
            timeout_s=INSTALL_TIMEOUT_S, code=code,
        )  # fmt: skip

    def configure(self) -> None:
        """Fill in what install.sh asked for."""
        environment = self.stack.environment
        for name, value in environment.items():
            if name.endswith("DATABASE_URL") and name != "ANALYST_DATABASE_URL":
                self.box.write(f"{ETC}/secrets/{name}", value)
        for name in ("RESERVATION_SECRET_KEY", "RESERVATION_ADMIN_TOKEN"):
            self.box.write(f"{ETC}/secrets/{name}", environment[name])
        brokers = environment["KAFKA_BOOTSTRAP_SERVERS"]
        self.box.write(f"{ETC}/kafka.env", f"KAFKA_BOOTSTRAP_SERVERS={brokers}\n")
        self.box.write(f"{ETC}/reservation-service.env", "RESERVATION_HOLD_SECONDS=5\n")
        self.box.write(f"{ETC}/outbox-relay.env", f"METRICS_PORT={free_port()}\n")
        for number in (1, 2, 3):
            path = f"{ETC}/data-platform-worker-{number}.env"
            self.box.write(path, f"METRICS_PORT={free_port()}\n")
        listen = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{self.port}\n"
        self.box.write(f"{UNITS}/reservation-service.socket.d/port.conf", listen)
        for unit in (RELAY, "data-platform-worker@.service"):
            self.box.write(f"{UNITS}/{unit}.d/soon.conf", f"[Service]\nWatchdogSec={WATCHDOG_S}\n")

    def pids(self) -> dict[str, int]:
        """The main process of each program that is active."""
        return {unit: self.box.process(unit)[0] for unit in IN_ORDER}

    def all_run(self, release: str = "") -> bool:
        """Whether all do, by that release's files."""
        found = [self.box.process(unit) for unit in IN_ORDER]
        return all(number and name.startswith(release) for number, name in found)

    def wait_running(self, release: str = "") -> None:
        """Wait for that."""
        wait_until(lambda: self.all_run(release), SETTLE_TIMEOUT_S, f"all to run {release}")

    def comes_again(self, before: dict[str, int], *units: str) -> None:
        """Wait until systemd has started these anew, and only these."""

        def again() -> bool:
            now = self.pids()
            return all(now[unit] not in {0, before[unit]} for unit in units)

        wait_until(again, SETTLE_TIMEOUT_S, f"{', '.join(units)} to be started again")
        now = self.pids()
        ended = [unit for unit in IN_ORDER if unit not in units and now[unit] != before[unit]]
        if ended:
            raise DevstackError(f"ended as well: {ended}")

    def loaded(self) -> dict[str, str]:
        """The analysts' reservations: id → status."""
        with psycopg.connect(self.stack.environment["ANALYST_DATABASE_URL"]) as analyst:
            return dict(analyst.execute(LOADED).fetchall())

    def catches_up(self, load: Load) -> None:
        """Wait until what has been booked up to now is in the tables."""
        told = set(load.told)
        wait_until(lambda: told <= self.loaded().keys(), SETTLE_TIMEOUT_S, "bookings to be loaded")


def check_units(scene: Scene) -> str:
    """`systemd-analyze`: every unit as systemd takes it, every service hardened."""
    worst = 0.0
    for unit in [*IN_ORDER, *ONCE]:
        said = scene.box("systemd-analyze", "verify", unit)
        others = [line for line in said.splitlines() if "/dev/" not in line]
        unknown = [line for line in others if not NEWER.search(line)]
        if unknown:
            raise DevstackError(f"systemd-analyze verify {unit}: {unknown}")
        found = re.search(r"exposure level for .*: ([0-9.]+)",
                          scene.box("systemd-analyze", "security", "--no-pager", unit))  # fmt: skip
        worst = max(worst, float(found[1]) if found else 10.0)
    if worst > EXPOSURE_MAX:
        raise DevstackError(f"systemd-analyze security: {worst}, more than {EXPOSURE_MAX}")
    return f"verify is silent, security {worst} at most"


def kill(scene: Scene, load: Load) -> str:
    """SIGKILL to relay, a worker and the service, each in turn."""
    for unit in (RELAY, WORKERS[0], SERVICE):
        before = scene.pids()
        scene.box("systemctl", "kill", "--signal=KILL", unit)
        scene.comes_again(before, unit)
        scene.catches_up(load)
    return "each was started again alone"


def freeze(scene: Scene, load: Load) -> str:
    """SIGSTOP to relay and a worker: their watchdogs end them."""
    units = (RELAY, WORKERS[1])
    before, began_s = scene.pids(), time.monotonic()
    for unit in units:
        scene.box("systemctl", "kill", "--signal=STOP", unit)
    scene.comes_again(before, *units)
    for unit in units:
        if "watchdog" not in scene.box("journalctl", "--no-pager", "--unit", unit).lower():
            raise DevstackError(f"{unit} was not ended by its watchdog")
    scene.catches_up(load)
    return f"ended by their watchdogs and back within {time.monotonic() - began_s:.0f} s"


def outage(scene: Scene, units: tuple[str, ...]) -> None:
    """For longer than a watchdog's patience nobody is ended, and a program can be started."""
    before = scene.pids()
    until_s = time.monotonic() + OUTAGE_S
    wait_until(lambda: time.monotonic() > until_s, OUTAGE_S + 5, "the outage to last")
    if scene.pids() != before:
        raise DevstackError(f"an outage ended a program: {before} became {scene.pids()}")
    for unit in units:
        scene.box("systemctl", "restart", unit)


def starve_of_kafka(scene: Scene, load: Load) -> str:
    """Kafka killed: people go on booking."""
    booked = load.count()
    for broker in scene.stack.kafka.brokers:
        broker.kill()
    outage(scene, (RELAY, WORKERS[2]))
    booked = load.count() - booked
    for broker in scene.stack.kafka.brokers:
        broker.launch()
    scene.stack.kafka.wait_ready()
    scene.catches_up(load)
    return f"{booked} booked meanwhile, loaded afterwards"


def starve_of_postgres(scene: Scene, load: Load) -> str:
    """Both databases stopped: customers wait, and get their seats."""
    servers = (scene.stack.analytics, scene.stack.reservations)
    for server, unit in zip(servers, (WORKERS[0], RELAY), strict=True):
        server.stop()
        if server is servers[0]:
            load.go_on(30)  # a worker without records misses no database
        wait_until(
            lambda unit=unit: "waiting" in scene.box.show(unit, "StatusText"),  # type: ignore[misc]
            SETTLE_TIMEOUT_S,
            f"{unit} to say that it waits",
        )
    outage(scene, (RELAY, WORKERS[0], SERVICE))
    for server in servers:
        server.start()
    load.go_on(20)
    scene.catches_up(load)
    return "all waited, and went on"


def restart(scene: Scene, load: Load) -> str:
    """The whole target."""
    before = scene.pids()
    scene.box("systemctl", "restart", "concert-reservation.target")
    scene.comes_again(before, *IN_ORDER)
    scene.catches_up(load)
    return "all came again"


def upgrade(scene: Scene, load: Load) -> str:
    """install.sh with a newer wheel: one at a time, each when the one before is up."""
    old, new = scene.wheels
    refused = load.refused
    scene.install(new)
    if not scene.all_run("0.2.0"):
        raise DevstackError("not all run the new release")
    times = [
        [int(scene.box.show(unit, f"{name}TimestampMonotonic")) for unit in IN_ORDER]
        for name in ("ActiveExit", "ActiveEnter")
    ]
    if any(ended < entered for ended, entered in zip(times[0][1:], times[1], strict=False)):
        raise DevstackError(f"two were down at the same time: {times}")
    before = scene.pids()
    scene.install(new)
    if scene.pids() != before:
        raise DevstackError("install.sh run again has restarted what was up to date")
    scene.catches_up(load)
    scene.install(old)
    if not scene.all_run("0.1.9"):
        raise DevstackError("not all went back to the old release")
    scene.catches_up(load)
    if load.refused != refused:
        raise DevstackError("the socket has refused customers while the service was restarted")
    return "one at a time; again: nothing restarted; and back"


def reboot(scene: Scene, load: Load) -> str:
    """The machine halts and boots."""
    began_s = time.monotonic()
    scene.box.stop()
    scene.box.start()
    scene.wait_running("0.1.9")
    took_s = time.monotonic() - began_s
    load.go_on(20)
    scene.catches_up(load)
    return f"all runs {took_s:.0f} s after the halt began"


def uninstall(scene: Scene) -> str:
    """uninstall.sh leaves nothing, and says what data there is; again it does no harm."""
    for _ in range(2):
        said = scene.box("bash", "/mnt/deploy/uninstall.sh")
        if "concert-catalogue" not in said:
            raise DevstackError("uninstall.sh doesn't say what data it leaves")
    ours = "reservation|outbox|data-platform|concert"
    left = scene.box("bash", "-c", f"ls -A /opt /etc/opt {UNITS}; systemctl list-units --all")
    if found := [line for line in left.splitlines() if re.search(ours, line)]:
        raise DevstackError(f"uninstall.sh left {found}")
    return "nothing left"


STEPS: dict[str, Callable[[Scene, Load], str]] = {
    "SIGKILL to relay, worker, service": kill,
    "SIGSTOP to relay and worker": freeze,
    "without Kafka": starve_of_kafka,
    "without Postgres": starve_of_postgres,
    "restart of the target": restart,
    "upgrade and rollback": upgrade,
    "reboot": reboot,
}


def prove(scene: Scene, steps: Steps) -> None:
    """The whole scene, booked through."""
    with steps.step("install.sh") as step:
        said = scene.install(scene.wheels[0], code=2)
        if "KAFKA_BOOTSTRAP_SERVERS" not in said:
            raise DevstackError(f"install.sh doesn't name what is missing: {said}")
        scene.configure()
        scene.install(scene.wheels[0])
        scene.wait_running("0.1.9")
        step.note("all runs")
    with steps.step("systemd-analyze") as step:
        steps.console.print(f"    {check_units(scene)}", highlight=False)
    performance_id, seats = seats_on_sale(scene)
    key = scene.stack.environment["RESERVATION_SECRET_KEY"]
    with Load(f"http://127.0.0.1:{scene.port}", key, performance_id, seats) as load:
        held = load.hold()
        load.go_on(20)
        scene.catches_up(load)
        for what, act in STEPS.items():
            with steps.step(what):
                steps.console.print(f"    {act(scene, load)}", highlight=False)
        load.finish()
        booked = load.count()
        scene.catches_up(load)
    with steps.step("audit"):
        audit(scene, load, held)
        steps.console.print(
            f"    {booked} bookings, all loaded; reconcile finds no difference; the longest wait "
            f"was {load.worst_s:.1f} s",
            highlight=False,
        )
    with steps.step("uninstall.sh"):
        steps.console.print(f"    {uninstall(scene)}", highlight=False)


def audit(scene: Scene, load: Load, held: str) -> None:
    """Compare what customers were told with the tables, and let `reconcile` compare the rest."""
    wait_until(
        lambda: scene.loaded().get(held) == "expired", SETTLE_TIMEOUT_S, "the timer's sweeper"
    )
    loaded = scene.loaded()
    if loaded != dict.fromkeys(load.told, "confirmed") | {held: "expired"}:
        raise DevstackError("the tables hold something else than customers were told")

    def settled() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "data_platform", "reconcile", "--json"],
            env=scene.stack.child_environment(), capture_output=True, text=True,
            timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise DevstackError(f"reconcile: {done.stdout[-2_000:]}{done.stderr[-2_000:]}")
        report: dict[str, Any] = json.loads(done.stdout)
        return {} if report["in_flight"] else report

    wait_until(settled, SETTLE_TIMEOUT_S, "nothing to be on its way")


def seats_on_sale(scene: Scene) -> tuple[int, list[int]]:
    """The biggest performance of the demo's, and its free seats."""
    succeed(scene.stack.program("reservation_service", "seed-demo"), COMMAND_TIMEOUT_S)
    base_url = f"http://127.0.0.1:{scene.port}/api"
    concerts: Any = get_json(f"{base_url}/concerts")
    performances = [one for concert in concerts["items"] for one in concert["performances"]]
    number = max(performances, key=lambda one: one["capacity"])["performance_id"]
    seats: Any = get_json(f"{base_url}/performances/{number}/seats")
    return number, [one["seat_id"] for one in seats["seats"] if one["status"] == "available"]


def pack(folder: Path) -> list[str]:
    """Make what an operator copies to a machine without network: two releases, and all wheels."""
    for name in ("deploy", "requirements"):
        shutil.copytree(REPOSITORY / name, folder / name)
    pip = [sys.executable, "-m", "pip"]
    for part in ("service", "relay", "loader", "tracing"):
        ran([*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
             "--requirement", f"requirements/{part}.txt", "--dest", folder / "wheels"])  # fmt: skip
    source = folder / "source"
    source.mkdir()
    for package in ("reservation_service", "outbox_relay", "data_platform", "migrations"):
        shutil.copytree(REPOSITORY / package, source / package)
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    for version in ("0.1.9", "0.2.0"):
        changed = re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', project)
        (source / "pyproject.toml").write_text(changed, "utf-8")
        ran([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--wheel-dir", folder / "dist", source])  # fmt: skip
    return sorted(path.name for path in (folder / "dist").iterdir())


def ran(command: list[str | Path]) -> None:
    """Run a program of the workshop.

    Raises:
        DevstackError: it failed; with what it said.
    """
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True,
        timeout=INSTALL_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DevstackError(f"{command[3]}: {done.stdout[-1_000:]}{done.stderr[-2_000:]}")


@contextmanager
def telling_the_journal(scene: Scene) -> Iterator[None]:
    """Show what the units said when something goes wrong."""
    try:
        yield
    except (DevstackError, TimeoutError, psycopg.Error):
        click.echo(scene.box("bash", "-c", LOOK), err=True)
        raise


@click.command()
def main() -> None:
    """Prove deploy/."""
    with ending_well(130):
        named = os.environ.get("SYSTEMD_BOX", "")
        if not named or not os.access(named, os.X_OK):
            raise ConfigurationError(
                "SYSTEMD_BOX: expected a command that boots systemd: start, exec, stop"
            )
        if os.geteuid() != 0:
            raise ConfigurationError("SYSTEMD_BOX: booting it needs root")
        with Steps() as steps, Stack(1, steps) as stack:
            shared = stack.run.path / "shared"
            shared.mkdir()
            with steps.step("two releases and their wheels"):
                wheels = pack(shared)
            stack.start()
            disk = stack.run.path / "disk"
            with Box(Path(named).resolve(), disk, shared) as box:
                with steps.step("boot"):
                    box.start()
                scene = Scene(box, stack, wheels)
                with telling_the_journal(scene):
                    prove(scene, steps)


if __name__ == "__main__":
    main()
