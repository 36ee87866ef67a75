"""`make variables`: write the table of variables in docs/operations.md again.

Names, readers, defaults and what is expected come from the settings of the three packages; what a
variable means is prose, and is kept as it stands in the table. A test compares.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import HttpUrl, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

import data_platform.config
import outbox_relay.config
import reservation_service.config

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
READERS = {
    "service": reservation_service.config,
    "relay": outbox_relay.config,
    "platform": data_platform.config,
}
HEAD = "| variable | read by | default | expected | meaning |\n|-|-|-|-|-|\n"
ROW = re.compile(r"^\| `([A-Z_]+)` \|.*\|([^|]*)\|\n", re.MULTILINE)


@dataclass
class Variable:
    """A variable as the code knows it; `expected` is empty where the code asks for nothing."""

    name: str
    default: str
    expected: str
    secret: bool
    readers: list[str] = field(default_factory=list)


def variables() -> Mapping[str, Variable]:
    """Return every variable of the three packages."""
    found: dict[str, Variable] = {}
    for reader, module in READERS.items():
        for info_name, info in _fields(module):
            variable = found.setdefault(info_name, _variable(info_name, info))
            if reader not in variable.readers:
                variable.readers.append(reader)
    return found


def table(document: str) -> str:
    """Return the table for a document, with the meanings that the document has."""
    meanings = {name: meaning.strip() for name, meaning in ROW.findall(document)}
    known = variables()
    names = [name for name in meanings if name in known]
    names += [name for name in known if name not in meanings]
    return HEAD + "".join(_row(known[name], meanings.get(name, "")) for name in names)


def renewed(document: str) -> str:
    """Return the document with its table as the code wants it."""
    begin = document.index("| variable | ")
    end = document.index("\n\n", begin) + 1
    return document[:begin] + table(document) + document[end:]


def _row(variable: Variable, meaning: str) -> str:
    name, readers = variable.name, ", ".join(variable.readers)
    expected = variable.expected
    if variable.secret:
        expected = f"secret, {expected}" if expected != "text" else "secret"
    return f"| `{name}` | {readers} | {variable.default} | {expected} | {meaning} |\n"


def _fields(module: object) -> Iterator[tuple[str, FieldInfo]]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, BaseSettings):
            for name, info in value.model_fields.items():
                yield info.alias or name.upper(), info


def _variable(name: str, info: FieldInfo) -> Variable:
    shown = "required" if info.is_required() else "none"
    if not info.is_required() and info.default not in (None, ""):
        shown = f"`{info.default}`"
    return Variable(
        name, shown, info.description or _expected(info), _holds_secret(info.annotation)
    )


def _expected(info: FieldInfo) -> str:
    """Return what a field without a description takes, by its type and bounds."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not None]
    if get_origin(info.annotation) is Literal:
        return ", ".join(map(str, kinds))
    bounds: dict[str, Any] = {
        bound: getattr(one, bound)
        for one in info.metadata
        for bound in ("ge", "le")
        if hasattr(one, bound)
    }
    if "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    if "ge" in bounds:
        return f"{bounds['ge']} or more"
    if Path in kinds:
        return "a file"
    return "an HTTP(S) URL" if HttpUrl in kinds else "text"


def _holds_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_holds_secret, get_args(annotation)))


def main() -> None:
    """Write the table of variables again."""
    before = DOCUMENT.read_text("utf-8")
    DOCUMENT.write_text(renewed(before), "utf-8")


if __name__ == "__main__":
    main()
