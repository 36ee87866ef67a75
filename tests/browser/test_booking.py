"""Booking in real browsers: fights, deadlines, restarts, no script, keyboard, phone, languages."""

import re
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import TIMEOUT_MS, Visit
from tests.reservation_service.conftest import Serve, Served
from tests.reservation_service.house import House, bearer, is_ready
from tests.waiting import wait_until

expect.set_options(timeout=TIMEOUT_MS)
LOAD_MAX_BYTES = 100_000
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 740},
    "is_mobile": True,
    "has_touch": True,
}


def hall(house: House) -> str:
    return f"/performances/{house.performance_id}"


def seat(page: Page, number: int) -> Any:
    """A seat of row A by its number."""
    return page.locator(".row label", has=page.locator(f'b:text-is("{number}")')).locator("input")


def picks(page: Page) -> Any:
    return page.locator("#picks button")


def hold(page: Page) -> None:
    page.get_by_role("button", name="Hold these seats").click()
    expect(page.locator(".status.held")).to_be_visible()


def take(served: Served, house: House, *numbers: int) -> None:
    """Somebody else takes seats, without a browser."""
    order = house.order(*(house.seat_ids[number - 1] for number in numbers), confirm=True)
    answer = httpx.post(f"{served.url}/api/reservations", json=order, headers=bearer("eve"))
    assert answer.status_code == 201


def test_two_browsers_fight_for_a_seat_and_the_slower_one_keeps_the_rest(
    house: House, served: Served, visit: Visit
) -> None:
    ann, bob = (visit(served, hall(house)) for _ in range(2))
    # Bob's map stands still, so that his own hold is the first to tell him.
    bob.route("**/seats", lambda route: route.fulfill(status=304))
    for number in (1, 2, 3):
        seat(bob, number).check()
        drawn = seat(bob, number).locator("+ b")  # the mouse is still over it
        expect(drawn).to_have_css("background-color", "rgb(122, 35, 64)")
    for number in (3, 4):
        seat(ann, number).check()
    hold(ann)
    expect(ann.locator("tfoot .price")).to_have_text("€100.00")
    bob.get_by_role("button", name="Hold these seats").click()
    expect(bob.locator("#told")).to_contain_text("Just taken by somebody else: Parkett, row A")
    expect(picks(bob)).to_have_count(2)
    expect(bob.locator("#sum")).to_have_text("Total €100.00")
    expect(seat(bob, 3)).to_be_disabled()
    hold(bob)
    bob.get_by_role("button", name="Confirm for €100.00").click()
    expect(bob.locator(".status.confirmed")).to_be_visible()
    house.check()


def test_what_others_take_and_give_back_shows_by_itself(
    house: House, served: Served, visit: Visit
) -> None:
    page = visit(served, hall(house))
    seat(page, 5).check()
    seat(page, 6).check()
    seat(page, 6).focus()
    other = visit(served, hall(house))
    seat(other, 6).check()
    hold(other)
    expect(page.locator("#told")).to_contain_text("seat 6. Your other seats are still chosen.")
    expect(seat(page, 6)).to_have_accessible_name("6, held")
    expect(picks(page)).to_have_count(1)
    expect(page.locator(":focus")).to_have_accessible_name("7")
    other.get_by_role("button", name="Give the seats back").click()
    expect(seat(page, 6)).to_be_enabled()
    expect(page.locator("#free")).to_have_text("20 of 20 free")
    polls: list[int] = []
    page.on("response", lambda answer: polls.append(answer.status))
    with page.expect_response("**/seats"), page.expect_response("**/seats"):
        pass
    page.wait_for_timeout(10)
    assert set(polls) == {304}, "nothing has changed"


def test_a_hold_runs_out_before_one_s_eyes(house: House, serve: Serve, visit: Visit) -> None:
    served = serve(env={"RESERVATION_HOLD_SECONDS": "3"})
    page = visit(served, hall(house))
    seat(page, 1).check()
    hold(page)
    expect(page.locator("[data-countdown] b")).to_have_text(re.compile("0:0[1-3]"))
    expect(page.locator(".status.expired")).to_be_visible()
    page.get_by_role("link", name="Choose seats again").click()
    expect(seat(page, 1)).to_be_enabled()


def test_more_time_is_given_until_there_is_no_more(
    house: House, serve: Serve, visit: Visit
) -> None:
    served = serve(env={"RESERVATION_HOLD_SECONDS": "600", "RESERVATION_HOLD_MAX_SECONDS": "601"})
    page = visit(served, hall(house))
    seat(page, 1).check()
    hold(page)
    page.wait_for_timeout(1_100)
    more = page.get_by_role("button", name="More time")
    more.click()
    expect(more).to_have_count(0)
    expect(page.locator(".status.held")).to_be_visible()


def test_the_server_restarts_in_between_and_nothing_is_lost(
    house: House, serve: Serve, visit: Visit
) -> None:
    served = serve()
    page = visit(served, hall(house))
    expect(page.locator("#live")).to_have_text("Live")
    seat(page, 1).check()
    seat(page, 2).check()
    served.process.stop(15)
    expect(page.locator("#live")).to_have_text("Connection lost. Trying again…")
    page.get_by_role("button", name="Hold these seats").click()
    expect(page.locator("#told")).to_have_text("One moment…")
    serve("--port", str(served.port), wait=False)
    wait_until(lambda: is_ready(served.url), 30, "the service again")
    expect(page.locator(".status.held")).to_be_visible()
    expect(page.locator("tbody tr")).to_have_count(2)
    taken = house.execute(
        "SELECT 1 FROM reservations WHERE performance_id = %s", house.performance_id
    )
    assert len(taken) == 1


def test_everything_is_possible_without_script(house: House, served: Served, visit: Visit) -> None:
    page = visit(served, java_script_enabled=False)
    page.locator(f'a[href="{hall(house)}"]').click()
    take(served, house, 2)
    seat(page, 1).check(force=True)
    seat(page, 2).check(force=True)
    page.get_by_role("button", name="Hold these seats").click()
    expect(page.get_by_role("alert")).to_contain_text("no longer available")
    expect(seat(page, 1)).to_be_checked()
    hold(page)
    page.get_by_role("button", name="Confirm for").click()
    expect(page.locator(".status.confirmed")).to_be_visible()
    code = page.locator(".code b").inner_text()
    page.goto(f"{served.url}{hall(house)}")
    page.get_by_label("Number of seats").fill("3")
    page.get_by_role("button", name="Hold the best seats").click()
    expect(page.locator("tbody tr")).to_have_count(3)
    other = visit(served, "/reservations", java_script_enabled=False)
    other.get_by_label("Reserved on another device?").fill(code.lower())
    other.get_by_role("button", name="Find").click()
    other.get_by_text("Cancel this reservation").click()
    other.get_by_role("button", name="Yes, cancel it").click()
    expect(other.locator(".status.cancelled")).to_be_visible()


def test_the_keyboard_is_enough(house: House, served: Served, visit: Visit) -> None:
    page = visit(served, hall(house))
    take(served, house, 2)
    expect(seat(page, 2)).to_be_disabled()
    focused = page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if (
                focused.count()
                and focused.evaluate("e => e.textContent || e.ariaLabel || e.value") == name
            ):
                return
        pytest.fail(f"Tab does not reach {name}")

    page.locator("summary").focus()
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("1")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    expect(focused).to_have_accessible_name("3")
    page.keyboard.press("Space")
    expect(picks(page)).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.locator(".status.held")).to_be_visible()
    expect(page.locator("tbody tr").nth(1)).to_contain_text("seat 3")
    page.get_by_role("button", name="Give the seats back").press("Enter")
    page.get_by_role("link", name="Choose seats again").press("Enter")
    for number in (1, 3):
        seat(page, number).press("Space")
    tab_to("Hold these seats")
    page.keyboard.press("Enter")
    expect(page.locator(".status.held")).to_be_visible()
    tab_to("Confirm for €100.00")
    page.keyboard.press("Enter")
    expect(page.locator(".status.confirmed")).to_be_visible()


def test_a_phone_has_room_for_everything(house: House, served: Served, visit: Visit) -> None:
    # Browsers write forints without decimals; 5000 fillér are 50 of them all the same.
    house.execute(
        "UPDATE concerts SET currency = 'HUF' FROM performances AS p"
        " WHERE p.concert_id = concerts.concert_id AND performance_id = %s",
        house.performance_id,
    )
    page = visit(served, "/", **PHONE)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    page.locator(f'a[href="{hall(house)}"]').tap()
    seat(page, 1).tap()
    seat(page, 9).tap()
    expect(page.locator("#sum")).to_have_text("Total HUF\u00a0100.00")
    assert not page.evaluate(wide)
    hold(page)
    assert not page.evaluate(wide)
    page.goto(f"{served.url}/reservations")
    assert not page.evaluate(wide)


def test_korean_is_spoken_to_who_speaks_it_and_the_switch_is_remembered(
    house: House, served: Served, visit: Visit
) -> None:
    page = visit(served, hall(house), locale="ko-KR")
    seat(page, 1).check()
    expect(page.locator("#sum")).to_have_text("합계 €50.00")
    page.get_by_role("button", name="선택한 좌석 선점하기").click()
    expect(page.locator(".status.held")).to_have_text("선점 중")
    page.get_by_role("link", name="English").click()
    expect(page.locator(".status.held")).to_have_text("Held for you")
    page.get_by_role("link", name="My reservations").click()
    expect(page.locator("h1")).to_have_text("My reservations")


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-GB"), ("dark", "ko-KR")])
def test_axe_finds_nothing_on_any_page(
    house: House, served: Served, visit: Visit, scheme: str, locale: str
) -> None:
    take(served, house, 2)
    page = visit(served, color_scheme=scheme, reduced_motion="reduce", locale=locale)
    check_axe(page)
    page.goto(f"{served.url}{hall(house)}")
    seat(page, 1).check()
    expect(picks(page)).to_have_count(1)
    check_axe(page)
    page.locator("#hold").click()
    for state in ("held", "confirmed", "cancelled"):
        expect(page.locator(f".status.{state}")).to_be_visible()
        check_axe(page)
        if state == "confirmed":
            page.locator("main details summary").click()
            check_axe(page)
        page.locator("form.actions button").first.click() if state != "cancelled" else None
    for path in ("/reservations", "/nothing"):
        page.goto(f"{served.url}{path}")
        check_axe(page)


def check_axe(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_hall_of_5000_seats_loads_light_and_stays_quick(
    house: House, served: Served, visit: Visit
) -> None:
    house.execute(
        """
        INSERT INTO seats (performance_id, section, "row", number, price)
        SELECT %s, 'Tier ' || tier, "row"::text, number, 10000 - 1000 * tier
        FROM generate_series(1, 5) AS tier, generate_series(1, 25) AS "row",
            generate_series(1, 40) AS number
        """,
        house.performance_id,
    )
    page = visit(served, hall(house))
    loaded = page.evaluate(
        "performance.getEntries().reduce((sum, each) => sum + (each.transferSize ?? 0), 0)"
    )
    assert 10_000 < loaded < LOAD_MAX_BYTES
    page.evaluate(
        """() => {
            window.changes = 0;
            const count = (found) => { window.changes += found.length; };
            new MutationObserver(count).observe(document.getElementById("map"),
                { subtree: true, attributes: true, attributeFilter: ["class", "disabled"] });
        }"""
    )
    take(served, house, 1, 2)
    expect(page.locator(".row label.t")).to_have_count(2)
    assert page.evaluate("window.changes") <= 8, "only what has changed is drawn again"
    page.locator("summary").nth(5).click()
    page.locator("[data-section='Tier 5'] [data-row='25'] input").last.check()
    expect(page.locator("#sum")).to_have_text("Total €50.00")
