"""What a stranger installs: a wheel that is whole, and locks that pin everything."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_three_packages_and_the_migrations_and_nothing_of_the_workshop(
    wheel: Path,
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"reservation_service", "outbox_relay", "data_platform", "migrations"}
    for database in ("reservations", "analytics"):
        assert any(name.startswith(f"migrations/{database}/versions/0001") for name in names)
    assert "migrations/env.py" in names


def test_the_installed_wheel_finds_its_migrations(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import migrations; print(migrations.__file__, migrations.head('analytics'))",
        ],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert str(tmp_path) in done.stdout
    assert "analytics_0" in done.stdout


# Lets a program see only what a lock file installs.
ONLY_LOCKED = """
import importlib, importlib.metadata, pkgutil, sys

package, *locked = sys.argv[1:]
allowed = {name.lower().replace("_", "-") for name in locked} | {"concert-reservation"}
modules = importlib.metadata.packages_distributions()

class Installed:
    def find_spec(self, name, path=None, target=None):
        owners = modules.get(name.partition(".")[0], [])
        if owners and not any(o.lower().replace("_", "-") in allowed for o in owners):
            raise ModuleNotFoundError(f"{name} is not locked for {package}", name=name)

sys.meta_path.insert(0, Installed())
for name in package.split(","):
    root = importlib.import_module(name)
    for module in pkgutil.walk_packages(root.__path__, f"{name}."):
        if module.name == "migrations.env":  # runs only inside a migration
            continue
        if module.name.endswith(".tracing") and "opentelemetry-sdk" not in allowed:
            continue  # imported only where traces are on
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("more", [(), ("tracing",)])
@pytest.mark.parametrize(
    ("lock", "packages"),
    [
        ("service", "reservation_service,migrations"),
        ("relay", "outbox_relay"),
        ("loader", "data_platform,migrations"),
    ],
)
def test_a_part_runs_with_what_its_own_lock_installs(
    lock: str, packages: str, more: tuple[str, ...]
) -> None:
    locks = [ROOT / "requirements" / f"{name}.txt" for name in (lock, *more)]
    text = "".join(path.read_text(encoding="utf-8") for path in locks)
    locked = re.findall(r"^([a-z0-9._-]+)==", text, flags=re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", ONLY_LOCKED, packages, *locked],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_pins_everything_with_hashes_and_names_no_index(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    pins = re.findall(r"^[a-z0-9][^\s;]*", text, flags=re.MULTILINE)
    assert len(pins) > 5
    assert all("==" in pin for pin in pins)
    assert text.count("==") <= text.count("--hash=sha256:")
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_every_part_has_a_lock_of_its_own() -> None:
    assert {lock.stem for lock in LOCKS} == {
        *("dev", "build"),
        *("service", "relay", "loader", "tracing"),
    }
