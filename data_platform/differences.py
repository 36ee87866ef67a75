"""What a check found to be unlike: where, which row, and both values."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        what: `missing`, `extra` or `altered`, as seen from where the truth is.
        where: the table, and for an altered row its column.
        key: which row.
        expected: what the source says; None where it knows nothing.
        found: what stands there; None where nothing does.
    """

    what: str
    where: str
    key: str
    expected: Any = None
    found: Any = None

    def in_words(self) -> str:
        """Return one line for people, without control characters."""
        line = f"{self.what}: {self.where} {self.key}"
        if self.what == "altered":
            line += f": expected {self.expected!r}, found {self.found!r}"
        elif self.what == "missing" and self.expected is not None:
            line += f": expected {self.expected!r}"
        elif self.found is not None:
            line += f": found {self.found!r}"
        return "".join(char if char.isprintable() else "?" for char in line)
