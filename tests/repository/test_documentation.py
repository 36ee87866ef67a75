"""What the documents say is checked where it can go stale."""

import re
from pathlib import Path

import pytest

from tests.repository.variables import ROW, renewed, variables

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_table_of_variables_is_what_the_code_says_and_explains_each() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert renewed(text) == text, "make variables"
    meanings = dict(ROW.findall(text))
    assert set(meanings) == set(variables())
    assert all(meaning.strip() for meaning in meanings.values())


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
