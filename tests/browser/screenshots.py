"""Take the README's pictures of the booking pages: `python -m tests.browser.screenshots [FOLDER]`.

A real service on a Postgres of its own, with the demo's concerts and some seats taken.
"""

import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page

from devstack.parts import new_postgres
from devstack.processes import Process, wait_until
from devstack.state import Run, free_port
from reservation_service import catalogue, demo
from reservation_service.database import connect
from tests.browser.conftest import launched
from tests.databases import create_reservation_database
from tests.reservation_service.house import ADMIN_TOKEN, SECRET_KEY, bearer, is_ready

IMAGES = Path(__file__).parents[2] / "docs/images"
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
    with Run() as run, ExitStack() as cleanup:
        server = new_postgres(run, "postgres-screenshots", None, prefer_containers=False)
        cleanup.callback(server.close)
        server.start()
        database = create_reservation_database(server)
        with connect(database.service_url, "screenshots") as connection:
            demo.seed(connection)
            seats = catalogue.read_seats(connection, HALL).seats
        environment = {
            "RESERVATION_DATABASE_URL": database.service_url,
            "RESERVATION_SECRET_KEY": SECRET_KEY,
            "RESERVATION_ADMIN_TOKEN": ADMIN_TOKEN,
        }
        port = free_port()
        command = [sys.executable, "-m", "reservation_service", "serve", "--port", str(port)]
        log = folder / "screenshots.log"
        cleanup.callback(log.unlink, missing_ok=True)
        process = Process(command, log=log, env=os.environ | environment)
        cleanup.callback(process.stop, 15)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), 60, "the service")
        sell(url, [seat.seat_id for seat in seats])
        take(launched(cleanup), url, folder)


def sell(url: str, seat_ids: list[int]) -> None:
    """Take some seats, always the same ones."""
    chance = random.Random(1)  # noqa: S311 - it shall look the same each time
    for number in range(45):
        first = chance.randrange(len(seat_ids) - 4)
        order = {
            "performance_id": HALL,
            "seat_ids": seat_ids[first : first + chance.randint(1, 4)],
            "confirm": number % 5 > 0,
        }
        answer = httpx.post(f"{url}/api/reservations", json=order, headers=bearer(f"c{number}"))
        assert answer.status_code in {201, 409}


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
