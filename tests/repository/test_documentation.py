"""What the documents say is checked where it can go stale."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

import data_platform.config
import outbox_relay.config
import reservation_service.config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def variables() -> dict[str, object]:
    """Every variable of the three packages with its default."""
    found: dict[str, object] = {}
    for module in (reservation_service.config, outbox_relay.config, data_platform.config):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, BaseSettings):
                for name, field in value.model_fields.items():
                    found[field.alias or name.upper()] = field.default
    return found


def test_every_variable_is_documented_with_its_default_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    documented = {
        name: default.strip("` ")
        for name, default in re.findall(r"^\| `([A-Z_]+)` \|([^|]*)\|", text, re.MULTILINE)
    }
    expected = variables()
    assert set(documented) == set(expected)
    for name, default in documented.items():
        if default and default != "none":
            assert str(expected[name]) == default, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text("utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_the_makefile_has_what_the_documents_tell_people_to_type() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    told = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text("utf-8"), re.MULTILINE)
    }
    assert {"demo", "test", "up", "stack", "check", "lint"} <= told
    assert told <= targets
