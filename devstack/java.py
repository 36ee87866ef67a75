"""Java, Maven and the jars of Kafka or of a pom: found, installed or downloaded, once.

The jars are kept in the cache by version. A download goes to a folder beside its place, under a
lock, and is renamed when it is whole: a killed one leaves nothing that looks like jars, and two
starts at once download once.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from devstack.processes import ConfigurationError, DevstackError, Process, succeed
from devstack.state import Run, cache, locked

DEFAULT_KAFKA_VERSION = "4.3.0"
# SHA-256 of `sha256sum *.jar`, of all that Maven brings for a version; another version is taken
# as Maven has checked it.
JARS_SHA256 = {
    "4.3.0": "36c0981518619edcbbd4d74fc1ad0e0da766c8a3ed848400cd56a021fad0d704",
    "3.9.2": "aea7a5c231fa124b118209d52b9fe968e420e08f7e1f7bfec392f8c1de62b951",
}
OLDEST_JAVA = 17
JAVA_ANSWER_TIMEOUT_S = 20
DOWNLOAD_TIMEOUT_S = 900.0
INSTALL_TIMEOUT_S = 900.0
POM = Path(__file__).with_name("kafka-pom.xml")
# Debian's and Ubuntu's names; whichever the release has is at least Java 17 where we can run.
JAVA_PACKAGE = "default-jre-headless"

Progress = Callable[[str], None]


def kafka_version() -> str:
    """The version that DEVSTACK_KAFKA names.

    Raises:
        ConfigurationError: it isn't a version number.
    """
    version = os.environ.get("DEVSTACK_KAFKA") or DEFAULT_KAFKA_VERSION
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ConfigurationError(f"DEVSTACK_KAFKA: expected a version like 4.3.0, not {version!r}")
    return version


def missing() -> list[str]:
    """What this machine lacks to run Kafka from its jars: "Java 17", "Maven", both or nothing."""
    lacking = [] if _java() else [f"Java {OLDEST_JAVA}"]
    if not _jars_folder().is_dir() and not shutil.which("mvn"):
        lacking.append("Maven")
    return lacking


def can_install() -> bool:
    """Whether we may install packages: root on Debian or Ubuntu."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def java_and_jars(run_: Run, progress: Progress) -> tuple[Path, Path]:
    """The java program and the folder with Kafka's jars; fetched when missing.

    Args:
        run_: where logs go.
        progress: told what is going on, several times a second.

    Raises:
        ConfigurationError: Java or Maven is missing and can't be installed by us.
        DevstackError: a download failed; with the end of its output.
        TimeoutError: it took longer than the limits above.
    """
    lacking = missing()
    if lacking and not can_install():
        raise ConfigurationError(
            f"Kafka needs {' and '.join(lacking)}: install {JAVA_PACKAGE} and maven, "
            "or start a Docker engine"
        )
    with locked(cache() / "lock", DOWNLOAD_TIMEOUT_S):
        if lacking:
            _install_packages(run_, progress)
        folder = _jars_folder()
        if not folder.is_dir():
            _download_jars(POM, folder, run_, progress)
    java = _java()
    if not java:
        raise ConfigurationError(f"Kafka needs Java {OLDEST_JAVA} or newer; set JAVA_HOME to one")
    return java, folder


def jars_of(pom: Path, name: str, run_: Run, progress: Progress) -> Path:
    """The cache's folder `name` with the jars that a pom needs at run time; fetched when missing.

    Raises:
        ConfigurationError: Maven is missing.
        DevstackError: the download failed; with the end of its output.
        TimeoutError: it took longer than the limits above.
    """
    with locked(cache() / "lock", DOWNLOAD_TIMEOUT_S):
        folder = cache() / name
        if not folder.is_dir():
            if not shutil.which("mvn"):
                raise ConfigurationError(f"{name} needs Maven: install maven")
            _download_jars(pom, folder, run_, progress)
    return folder


def _java() -> Path | None:
    """A java of OLDEST_JAVA or newer from JAVA_HOME or PATH, or None."""
    java_home = os.environ.get("JAVA_HOME")
    candidates = [Path(java_home) / "bin" / "java"] if java_home else []
    found = shutil.which("java")
    candidates += [Path(found)] if found else []
    for candidate in candidates:
        if not candidate.exists():
            continue
        answer = subprocess.run(
            [candidate, "-version"],
            capture_output=True, text=True, check=False, timeout=JAVA_ANSWER_TIMEOUT_S,
        )  # fmt: skip
        version = re.search(r'version "(\d+)', answer.stderr)
        if version and int(version[1]) >= OLDEST_JAVA:
            return candidate
    return None


def _jars_folder() -> Path:
    return cache() / f"kafka-{kafka_version()}"


def _download_jars(pom: Path, folder: Path, run_: Run, progress: Progress) -> None:
    """Let Maven copy a pom's jars into a folder that gets its name when it is whole."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    maven = Process(
        [
            "mvn", "-q", "-B", "--strict-checksums", "-f", pom,
            f"-Dkafka.version={kafka_version()}",
            "dependency:copy-dependencies", "-DincludeScope=runtime",
            f"-DoutputDirectory={unfinished}",
        ],
        name="Maven", log=run_.path / "maven.log", keep_fds=[run_.lock_fd],
    )  # fmt: skip
    succeed(maven, DOWNLOAD_TIMEOUT_S, lambda: progress(f"{_megabytes(unfinished):.0f} MB so far"))
    if pom == POM:
        _check(unfinished)
    unfinished.rename(folder)


def _check(folder: Path) -> None:
    """Refuse jars of Kafka other than those we know (Maven has compared each with its server's)."""
    jars = sorted(folder.glob("*.jar"))
    sums = "".join(f"{hashlib.sha256(jar.read_bytes()).hexdigest()}  {jar.name}\n" for jar in jars)
    found = hashlib.sha256(sums.encode()).hexdigest()
    if (known := JARS_SHA256.get(kafka_version())) and found != known:
        raise DevstackError(
            f"Kafka {kafka_version()}: the jars are not those we know ({found}, expected {known})"
        )


def _install_packages(run_: Run, progress: Progress) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (
        ["update", "-q"],
        ["install", "-q", "-y", "--no-install-recommends", JAVA_PACKAGE, "maven"],
    ):
        installer = Process(
            ["apt-get", *arguments],
            name="apt-get", log=run_.path / "apt-get.log", env=environment,
            keep_fds=[run_.lock_fd],
        )  # fmt: skip
        progress("apt-get installs Java and Maven")
        succeed(installer, INSTALL_TIMEOUT_S)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.jar")) / 1e6
