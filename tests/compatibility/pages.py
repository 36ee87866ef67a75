"""Writes what was run into docs/compatibility.md, between the marks of its section."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "compatibility.md"


def marks(section: str) -> tuple[str, str]:
    """Return the lines before and after a section's table."""
    return f"<!-- {section}: written by its command -->", f"<!-- end of {section} -->"


def written(section: str) -> str:
    """Return what stands between a section's marks."""
    begin, end = marks(section)
    return PAGE.read_text("utf-8").partition(f"{begin}\n")[2].partition(end)[0]


def write(section: str, text: str) -> None:
    """Put `text` between a section's marks."""
    begin, end = marks(section)
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    PAGE.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; `columns` maps a heading to a row's key."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (str(row.get(name, "")).replace("_", " ") for name in columns.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
