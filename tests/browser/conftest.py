"""Real headless Chromium before the served booking pages."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, replace
from typing import Any, Protocol

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    WebError,
    sync_playwright,
)

from devstack.postgres import PostgresServer
from devstack.processes import Process
from devstack.state import free_port
from reservation_service import catalogue, catalogue_changes
from reservation_service.new_concert import NewConcert
from tests.databases import ReservationDatabase
from tests.require import require
from tests.reservation_service.conftest import Served, serve
from tests.reservation_service.house import House, concert, is_ready, open_house

__all__ = ["Visit", "serve"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 20_000
# What Chromium itself says of a refused or failed request; the tests make such on purpose.
EXPECTED = "Failed to load resource"


class Visit(Protocol):
    """Opens a path in a browser profile of its own; `options` as Playwright's new_context."""

    def __call__(self, served: Served, path: str = "/", **options: Any) -> Page: ...


def launched(cleanup: ExitStack) -> Browser:
    """Start the machine's Chromium; skips, and is accounted for, where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    require(program, "Chromium (apt-get install chromium)")
    playwright = cleanup.enter_context(sync_playwright())
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    cleanup.callback(browser.close)
    return browser


# Of the module, not the session: its event loop would be in the way of others in this process.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with ExitStack() as cleanup:
        yield launched(cleanup)


@pytest.fixture(scope="module")
def first_house(
    postgres_server: PostgresServer, reservation_template: ReservationDatabase
) -> Iterator[House]:
    """A house for all tests of the module; its database is dropped with it."""
    name, template = "reservations_of_browsers", reservation_template
    postgres_server.create_database(name, "reservation_owner", template.name)
    urls = [f"{url.rpartition('/')[0]}/{name}" for url in astuple(template)[1:]]
    with open_house(ReservationDatabase(name, *urls)) as opened:
        yield opened
    postgres_server.drop_database(name)


@pytest.fixture(scope="module")
def served(first_house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service, started once: it is the slow part."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = Process(
        [sys.executable, "-m", "reservation_service", "serve", "--port", str(port)],
        log=tmp_path_factory.mktemp("served") / "log",
        env=os.environ | first_house.environment,
    )
    try:
        process.wait_ready(lambda: is_ready(url), 60)
        yield Served(url, port, process)
    finally:
        process.stop(15)


@pytest.fixture
def house(first_house: House) -> House:
    """A performance of one's own in the shared house."""
    with first_house.connect() as connection:
        new = NewConcert.model_validate_json(json.dumps(concert()))
        location = catalogue_changes.publish(connection, new).location
        found = catalogue.read_concert(connection, int(location.rpartition("/")[2]))
        performance_id = found.performances[0].performance_id
        seats = catalogue.read_seats(connection, performance_id).seats
    return replace(
        first_house, performance_id=performance_id, seat_ids=[seat.seat_id for seat in seats]
    )


class Watch:
    """What went wrong in the pages of a test."""

    def __init__(self) -> None:
        self.strangers: list[str] = []
        self.errors: list[str] = []

    def over(self, context: BrowserContext, origin: str) -> None:
        """Note what goes to another origin, and errors in scripts or against the CSP."""

        def asked(request: Request) -> None:
            if not request.url.startswith(f"{origin}/"):
                self.strangers.append(request.url)

        def said(message: ConsoleMessage) -> None:
            if message.type == "error" and not message.text.startswith(EXPECTED):
                self.errors.append(message.text)

        def failed(error: WebError) -> None:
            self.errors.append(str(error.error))

        context.on("request", asked)
        context.on("console", said)
        context.on("weberror", failed)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens pages; at the end none has asked another origin or had an error in its script."""
    watch = Watch()
    with ExitStack() as cleanup:

        def open_page(served: Served, path: str = "/", **options: Any) -> Page:
            context = browser.new_context(**({"locale": "en-GB"} | options))
            cleanup.callback(context.close)
            context.set_default_timeout(TIMEOUT_MS)
            watch.over(context, served.url)
            page = context.new_page()
            page.goto(f"{served.url}{path}")
            return page

        yield open_page
    assert watch.strangers == []
    assert watch.errors == []
