"""Tests that this machine may be unable to run, and the account of them at the end.

A skip is for what a machine lacks, never for what we haven't done. `TESTS_REQUIRE_ALL=1` makes
every one a failure, a missing Docker engine apart.
"""

import os

import pytest

DOCKER_ENGINE = "a Docker engine"


def require(available: object, what: str) -> None:
    """Skip the test unless `available`; `what` is what it needs, like "root" or DOCKER_ENGINE."""
    if not available:
        pytest.skip(f"needs {what}")


class Account:
    """What could not be run, collected from the tests' reports."""

    def __init__(self) -> None:
        self._tests_by_reason: dict[str, list[str]] = {}

    def note(self, report: pytest.TestReport) -> None:
        """Remember a skipped test. An expected failure is no skip."""
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            reason = str(text).removeprefix("Skipped: ")
            self._tests_by_reason.setdefault(reason, []).append(report.nodeid)

    @property
    def failed(self) -> bool:
        """Whether something is missing that TESTS_REQUIRE_ALL=1 insists on."""
        reasons = [why for why in self._tests_by_reason if DOCKER_ENGINE not in why]
        return bool(reasons) and os.environ.get("TESTS_REQUIRE_ALL") == "1"

    def lines(self) -> list[str]:
        """The account, for people."""
        if not self._tests_by_reason:
            return ["nothing: every test could run here"]
        return [
            f"{reason}: {len(tests)} ({', '.join(tests[:3])}{', …' if len(tests) > 3 else ''})"
            for reason, tests in sorted(self._tests_by_reason.items())
        ]
