"""What chaos.publish says of runs, and what it may not hide."""

from typing import Any

from chaos.publish import mutants_table, recovery_table, runs_table, summary
from chaos.strikes import KINDS

RUN: dict[str, Any] = {
    "seed": 7,
    "delivery": "exactly_once",
    "seconds": 600,
    "healed_s": 4.5,
    "figures": {
        "answers": 3_000,
        "calls repeated": 17,
        "reservations told": 1_234,
        "events in the outbox": 2_000,
        "records delivered again on purpose": 50,
        "poisoned records": 9,
    },
    "struck": [
        {"kind": "relay killed", "in_vain": "", "recovered_s": {"service-1": 0.0, "relay": 2.0}},
        {"kind": "relay killed", "in_vain": "", "recovered_s": {"service-2": 0.4, "relay": 6.0}},
        {"kind": "worker frozen", "in_vain": "gone", "recovered_s": {"workers": None}},
    ],
    "differences": [],
}


def test_a_run_is_told_with_its_faults_in_vain_and_its_differences() -> None:
    cells = ["7, exactly_once, 600 s", "-, -", "3, 1 in vain", f"2 of {len(KINDS)}"]
    cells += ["3,000", "17", "1,234", "2,000", "50", "9"]
    assert runs_table([RUN])[-1] == f"| {' | '.join([*cells, '4.5', '**0**'])} |"
    wrong = RUN | {"differences": [{"kind": "event lost", "count": 3}]}
    assert runs_table([wrong])[-1].endswith("| **3** |")


def test_recovery_is_told_by_its_median_and_its_worst_and_never_is_never_left_out() -> None:
    lines = recovery_table([RUN])
    assert lines[2] == "| relay killed | 2 | 0.2, worst 0.4 | 4.0, worst 6.0 | - |"
    assert lines[3] == "| worker frozen | 1 | - | - | never (1 times) |"


def test_a_mutant_that_nothing_found_is_told() -> None:
    found = [
        {"name": "cursor-on-id", "fault": "rows committed late", "said": "nothing", "seconds": 41.2}
    ]
    assert mutants_table(found)[-1] == "| cursor-on-id | rows committed late | nothing | 41 |"


def test_the_summary_counts_differences_and_bugs_that_were_not_found() -> None:
    verdicts = [
        {"name": "none", "right": True},
        {"name": "cursor-on-id", "right": True},
        {"name": "swallowed-exception", "right": False},
    ]
    wrong = RUN | {"seed": 8, "differences": [{"kind": "event lost", "count": 3}]}
    said = summary([RUN, wrong], verdicts)
    assert said.startswith("Seeds 7, 8, 20 minutes in all: 6 faults of 2 kinds, 2,468 bookings")
    assert said.endswith("oversold: **3**. Of 2 deliberate bugs the same audit finds 1.")
