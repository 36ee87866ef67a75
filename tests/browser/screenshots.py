"""Take the README's pictures: `python -m tests.browser.screenshots [FOLDER]`.

The whole product with the demo's concerts; customers book, and the analysts' report shows it.
"""

import random
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
from playwright.sync_api import Browser, Page

from devstack.application import Application
from devstack.customers import Customers
from devstack.demo import seats_on_sale
from devstack.processes import succeed, wait_until
from devstack.stack import Stack
from devstack.steps import Steps
from reservation_service.callers import make_token
from tests.browser.conftest import launched

IMAGES = Path(__file__).parents[2] / "docs/images"
OTHERS = 1_200
FACTS = "SELECT count(*) FROM analytics.fct_reservation_events"
EVENTS = "SELECT count(*) FROM outbox WHERE topic = 'concert-reservation'"
HALL = 3  # the first evening of the demo's Beethoven
DESK: dict[str, Any] = {
    "reduced_motion": "reduce",
    "viewport": {"width": 1100, "height": 900},
    "locale": "en-GB",
}
PHONE: dict[str, Any] = DESK | {
    "viewport": {"width": 390, "height": 800},
    "has_touch": True,
    "is_mobile": True,
    "locale": "ko-KR",
    "color_scheme": "dark",
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    with Steps() as steps, Stack(1, steps) as stack, ExitStack() as cleanup:
        stack.start()
        application = cleanup.enter_context(Application(stack))
        application.seed()
        url = application.serve()
        application.run_pipeline()
        secret_key = stack.environment["RESERVATION_SECRET_KEY"]
        with steps.step("bookings"):
            sell(url, secret_key)
        browser = launched(cleanup)
        with steps.step("booking pages"):
            take(browser, url, folder)
        with steps.step("the analysts' report"):
            await_loaded(stack.environment)
            page = stack.run.path / "report.html"
            succeed(stack.program("data_platform", "report", "--output", str(page)), 60)
            report = browser.new_context(**DESK).new_page()
            report.goto(page.as_uri())
            report.get_by_role("heading", name="Occupancy").evaluate("it => it.scrollIntoView()")
            report.screenshot(path=folder / "report.png")


def sell(url: str, secret_key: str) -> None:
    """Take some seats: always the same ones of the hall that is shown, any of the others."""
    seats = seats_on_sale(url)
    hall = seats.pop(HALL)
    Customers(url, url, secret_key=secret_key, seats_by_performance=seats, on_booked=print_nothing,
              seed=1).book(OTHERS, 4)  # fmt: skip
    chance = random.Random(1)  # noqa: S311 - it shall look the same each time
    for number in range(45):
        first = chance.randrange(len(hall) - 4)
        order = {
            "performance_id": HALL,
            "seat_ids": hall[first : first + chance.randint(1, 4)],
            "confirm": number % 5 > 0,
        }
        bearer = {"Authorization": f"Bearer {make_token(f'c{number}', secret_key, 60)}"}
        answer = httpx.post(f"{url}/api/reservations", json=order, headers=bearer)
        assert answer.status_code in {201, 409}


def print_nothing(_reservation_id: str) -> None:
    """Nobody is told of a booking."""


def await_loaded(environment: Mapping[str, str]) -> None:
    """Wait until the tables have every event."""
    with (
        psycopg.connect(environment["RESERVATION_OWNER_DATABASE_URL"], autocommit=True) as ours,
        psycopg.connect(environment["ANALYST_DATABASE_URL"], autocommit=True) as theirs,
    ):
        wait_until(
            lambda: theirs.execute(FACTS).fetchone() == ours.execute(EVENTS).fetchone(),
            60,
            "every event in the tables",
        )


def take(browser: Browser, url: str, folder: Path) -> None:
    """Walk through a booking on a desk and look at it on a phone."""
    desk = browser.new_context(**DESK).new_page()
    desk.goto(url)
    desk.screenshot(path=folder / "concerts.png")
    choose(desk, url)
    desk.screenshot(path=folder / "seats.png")
    desk.locator("#hold").click()
    desk.locator(".countdown b").wait_for()
    desk.screenshot(path=folder / "hold.png")
    desk.get_by_role("button", name="Confirm").click()
    desk.locator(".status.confirmed").wait_for()
    desk.screenshot(path=folder / "ticket.png")
    phone = browser.new_context(**PHONE).new_page()
    choose(phone, url)
    phone.screenshot(path=folder / "phone.png")


def choose(page: Page, url: str) -> None:
    page.goto(f"{url}/performances/{HALL}")
    row = page.locator("[data-section=Stalls] [data-row='6'] input:enabled")
    for position in (4, 5):
        row.nth(position).check()
    page.locator("#live:not(:empty)").wait_for()
    page.evaluate("document.getElementById('map-title').scrollIntoView()")


if __name__ == "__main__":
    main()
