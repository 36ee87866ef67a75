"""The short form of `make chaos`: the whole product, small, and some faults one after the other."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from chaos import report
from chaos.trial import trial
from devstack.processes import ConfigurationError
from devstack.steps import Steps
from tests.require import require

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

FAULTS = [
    ("relay killed", 1.0),
    ("reservations: Postgres killed", 1.0),
    ("records delivered again", 1.0),
    ("poisoned records", 1.0),
    ("worker frozen", 2.0),
    ("network flickers between clients and services", 2.0),
]


def test_the_whole_product_under_faults_agrees_with_what_clients_were_told(tmp_path: Path) -> None:
    with Steps(Console(file=StringIO())) as steps:
        try:
            outcome = trial(FAULTS, steps, delivery="exactly_once", logs=tmp_path / "logs")
        except ConfigurationError as error:
            require(available=False, what=str(error))
            raise
    assert outcome.differences == []
    assert [struck.kind for struck in outcome.struck] == [name for name, _ in FAULTS]
    assert not any(struck.in_vain for struck in outcome.struck)
    assert outcome.figures["reservations told"] > 100
    assert outcome.figures["poisoned records"] > 0
    assert outcome.figures["records delivered again on purpose"] > 0

    said = StringIO()
    report.show(outcome, Console(file=said, width=200))
    report.write(outcome, tmp_path)
    assert "worker frozen" in said.getvalue()
    assert {"outcome.json", "faults.svg", "flow.svg"} <= {file.name for file in tmp_path.iterdir()}
