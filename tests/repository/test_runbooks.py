"""What the documents tell people to type exists: commands, options, statements, headings."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import psycopg
import pytest

import data_platform.__main__
import outbox_relay.__main__
import reservation_service.__main__
from tests.databases import AnalyticsDatabase, ReservationDatabase

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROGRAMS: dict[str, click.Command] = {
    "reservation-service": reservation_service.__main__.commands,
    "outbox-relay": outbox_relay.__main__.cli,
    "data-platform": data_platform.__main__.main,
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(rf"(?:^|`|; |\s)((?:{'|'.join(PROGRAMS)}) [a-z][^`;#&|\n]*)", re.MULTILINE)
ANALYTICS = re.compile(r"\banalytics\.")


def commands_in(text: str) -> Iterator[str]:
    """Commands of our three programs: whole lines of code, and what stands between backticks."""
    for _, code in FENCED.findall(text):
        for line in code.splitlines():
            yield from COMMAND.findall(line)
    for code in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
        yield from COMMAND.findall(" ".join(code.split()))


def told() -> list[tuple[str, str]]:
    found = {
        (str(path.relative_to(ROOT)), command.strip())
        for path in DOCUMENTS
        for command in commands_in(path.read_text("utf-8"))
    }
    return sorted(found)


def check(command: str) -> None:
    """Raise click's own error for a command that there isn't, or an option that it hasn't."""
    program, *words = shlex.split(command)
    group: click.Command = PROGRAMS[program]
    context = click.Context(group)
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        inner = group.get_command(context, name)
        if inner is None:
            raise click.NoSuchOption(name, f"{program} has no command {name}")
        group = inner
    options = {name for parameter in group.params for name in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in options:
            raise click.NoSuchOption(word)


def test_each_command_and_option_that_a_document_names_exists() -> None:
    commands = told()
    assert len(commands) > 40
    for document, command in commands:
        try:
            check(command)
        except (click.ClickException, ValueError) as error:
            pytest.fail(f"{document}: `{command}`: {error}")


def test_each_runbook_an_alert_leads_to_names_a_command_or_a_statement() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    steps = text.partition("## What to do when")[2].partition("\n## ")[0].split("\n### ")[1:]
    assert len(steps) > 15
    helpless = [
        step.partition("\n")[0]
        for step in steps
        if not (re.search(r"`[^`]+`", step) or "](#" in step)
    ]
    assert helpless == []


def anchors(path: Path) -> set[str]:
    """The places of a document that a link may lead to, as GitHub names them."""
    text = FENCED.sub("", path.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_into_a_document_lead_to_a_heading(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", document.read_text("utf-8"))
    missing = [
        f"{target}#{anchor}"
        for target, anchor in links
        if (document.parent / (target or document.name)).suffix == ".md"
        and anchor not in anchors(document.parent / (target or document.name))
    ]
    assert missing == []


def statements() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    return [
        (text[: match.start()].rpartition("\n### ")[2].partition("\n")[0], statement.strip())
        for match in FENCED.finditer(text)
        if match[1] == "sql"
        for statement in re.sub(r"--.*", "", match[2]).split(";")
        if statement.strip()
    ]


def test_each_statement_of_a_runbook_is_one_that_its_database_takes(
    reservation_database: ReservationDatabase, analytics_database: AnalyticsDatabase
) -> None:
    found = statements()
    assert len(found) >= 3
    for heading, statement in found:
        plannable = statement.startswith(("SELECT", "UPDATE", "DELETE"))  # and not to be done
        analysts = ANALYTICS.search(statement)
        url = (analytics_database if analysts else reservation_database).owner_url
        with psycopg.connect(url, autocommit=True) as owner:
            try:
                owner.execute(f"EXPLAIN {statement}".encode() if plannable else statement.encode())
            except psycopg.errors.UndefinedObject:
                assert "PREPARED" in statement, heading  # of a transaction that isn't there
            except psycopg.Error as error:
                pytest.fail(f"{heading}: {statement}: {error}")
