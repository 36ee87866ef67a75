"""The three parts meet in the database, the topic and the contracts, never in Python."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READS_ENVIRONMENT = re.compile(r"os\.environ(\.get|\[[^\]]+\](?!\s*=))|getenv\(")
PARTS = ("reservation_service", "outbox_relay", "data_platform")


def imported_packages(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_neither_another_part_nor_what_is_not_installed(part: str) -> None:
    modules = list((ROOT / part).rglob("*.py"))
    assert modules
    forbidden = {*PARTS, "devstack", "tests", "benchmarks"} - {part}
    found = {
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules
        for name in imported_packages(module) & forbidden
    }
    assert not found


@pytest.mark.parametrize("part", PARTS)
def test_only_the_configuration_reads_the_environment(part: str) -> None:
    found = [
        str(module.relative_to(ROOT))
        for module in (ROOT / part).rglob("*.py")
        if module.name != "config.py" and READS_ENVIRONMENT.search(module.read_text("utf-8"))
    ]
    assert not found
