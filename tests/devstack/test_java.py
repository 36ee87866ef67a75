"""Kafka's jars: downloaded once, whole or not at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devstack import java
from devstack.processes import ConfigurationError, DevstackError, descendants
from devstack.state import Run
from tests.waiting import wait_until

FETCH = """
from devstack.java import java_and_jars
from devstack.state import Run
with Run() as run:
    print(java_and_jars(run, lambda _: None)[1], flush=True)
"""
# Stands in for Maven: writes where it is told to, then does what the test wants.
MAVEN = """#!/bin/sh
for argument; do case "$argument" in -DoutputDirectory=*) folder="${argument#*=}";; esac; done
echo run >> "$DEVSTACK_HOME/maven-runs"
mkdir -p "$folder" && echo half > "$folder/one.jar"
%s
echo rest > "$folder/two.jar"
"""
JAVA = "#!/bin/sh\necho 'openjdk version \"%s\"' >&2\n"

FakeTools = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DEVSTACK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEVSTACK_KAFKA", "4.0.1")  # whose jars we do not know
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return tmp_path / "home"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTools:
    """Puts a java of a version, and a Maven that runs a line in mid-download, first on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def install(java_version: str, in_mid_download: str) -> None:
        for name, text in {"java": JAVA % java_version, "mvn": MAVEN % in_mid_download}.items():
            (programs / name).write_text(text, encoding="ascii")
            (programs / name).chmod(0o755)

    return install


def test_a_failed_download_leaves_no_jars_and_the_next_one_succeeds(
    own_home: Path, tools: FakeTools
) -> None:
    tools("17.0.1", "echo no route to host; exit 1")
    with Run() as run, pytest.raises(DevstackError, match="no route to host"):
        java.java_and_jars(run, lambda _: None)
    assert not (own_home / "cache" / "kafka-4.0.1").exists()
    tools("17.0.1", "rm -f nothing")
    with Run() as run:
        _, jars = java.java_and_jars(run, lambda _: None)
    assert {jar.name for jar in jars.iterdir()} == {"one.jar", "two.jar"}


def test_jars_other_than_those_we_know_are_refused(
    own_home: Path, tools: FakeTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools("17.0.1", "rm -f nothing")
    monkeypatch.setenv("DEVSTACK_KAFKA", "4.3.0")
    with Run() as run, pytest.raises(DevstackError, match=r"4\.3\.0: the jars are not those"):
        java.java_and_jars(run, lambda _: None)
    assert not (own_home / "cache" / "kafka-4.3.0").exists()


def test_a_start_that_is_killed_in_mid_download_leaves_no_jars(
    own_home: Path, tools: FakeTools
) -> None:
    tools("21.0.1", "sleep 300")
    cache = own_home / "cache"
    with subprocess.Popen([sys.executable, "-c", FETCH]) as start:
        wait_until(lambda: list(cache.glob("*/one.jar")), 20, "half of the download")
        family = descendants(start.pid)[1:]
        start.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 10, "their end")
    assert not (cache / "kafka-4.0.1").exists()


def test_two_starts_at_once_download_once(own_home: Path, tools: FakeTools) -> None:
    tools("17.0.1", f"until [ -e {own_home}/go ]; do sleep 0.02; done")
    starts = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wait_until((own_home / "maven-runs").exists, 20, "the download to begin")
    (own_home / "go").touch()
    answers = [start.communicate(timeout=30)[0] for start in starts]
    assert answers == [f"{own_home}/cache/kafka-4.0.1\n"] * 2
    assert (own_home / "maven-runs").read_text(encoding="ascii") == "run\n"


def test_an_old_java_counts_as_missing_and_one_line_says_what_to_install(
    tools: FakeTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools("11.0.2", "exit 1")
    monkeypatch.setattr(java, "can_install", lambda: False)
    with Run() as run, pytest.raises(ConfigurationError, match=r"Java 17.*install") as caught:
        java.java_and_jars(run, lambda _: None)
    assert "\n" not in str(caught.value)


def test_missing_packages_are_installed_where_we_may(
    own_home: Path, tools: FakeTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools("11.0.2", "rm -f nothing")
    (tmp_path / "new-java").write_text(JAVA % "17.0.1", encoding="ascii")
    (tmp_path / "new-java").chmod(0o755)
    apt_get = (
        f'#!/bin/sh\necho "$*" >> {own_home}/apt\ncp {tmp_path}/new-java {tmp_path}/bin/java\n'
    )
    (tmp_path / "bin" / "apt-get").write_text(apt_get, encoding="ascii")
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setattr(java, "can_install", lambda: True)
    with Run() as run:
        program, _ = java.java_and_jars(run, lambda _: None)
    assert program == tmp_path / "bin" / "java"
    calls = (own_home / "apt").read_text(encoding="ascii").splitlines()
    assert [call.split()[0] for call in calls] == ["update", "install"]


def test_a_kafka_version_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVSTACK_KAFKA", "../latest")
    with pytest.raises(ConfigurationError, match="DEVSTACK_KAFKA"):
        java.kafka_version()
