"""The booking pages without script: their forms, who may use them, what they say."""

import gzip
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from reservation_service import catalogue_changes, codes, pages
from reservation_service.new_concert import NewConcert
from tests.reservation_service.house import House, bearer, concert


def form(page: str) -> dict[str, Any]:
    """The hidden fields of a page's form."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]+)">', page))


def open_seats(house: House, client: FlaskClient) -> dict[str, Any]:
    return form(client.get(f"/performances/{house.performance_id}").text)


def test_a_guest_finds_a_concert_books_and_cancels(house: House, client: FlaskClient) -> None:
    start = client.get("/").text
    assert "Ein Abend mit Björk" in start
    path = f"/performances/{house.performance_id}"
    assert f'href="{path}"' in start
    fields = open_seats(house, client)
    chosen = {"seat_ids": house.seat_ids[:2], "action": "hold"}
    held = client.post(path, data=fields | chosen)
    assert held.status_code == 303
    reservation = held.headers["Location"]
    page = client.get(reservation).text
    assert "Held for you" in page
    assert "€100.00" in page
    for action, status in (("confirm", "confirmed"), ("cancel", "cancelled")):
        done = client.post(
            reservation, data=form(client.get(reservation).text) | {"action": action}
        )
        assert done.status_code == 303
        assert f'"status {status}"' in client.get(reservation).text
    cancelled = client.get(reservation).text
    assert "This reservation is cancelled." in cancelled
    assert f'href="{path}"' in cancelled
    assert "Cancelled" in client.get("/reservations").text
    assert [event["data"]["version"] for event in house.events()] == [1, 2, 3]


@pytest.mark.parametrize("choice", [{"action": "hold"}, {"action": "best", "count": "2"}])
def test_a_second_click_holds_nothing_more(
    house: House, client: FlaskClient, choice: dict[str, str]
) -> None:
    fields = open_seats(house, client) | choice | {"seat_ids": house.seat_ids[:1]}
    path = f"/performances/{house.performance_id}"
    first, second = (client.post(path, data=fields) for _ in range(2))
    assert first.headers["Location"] == second.headers["Location"]
    assert [event["type"] for event in house.events()] == ["reservation.held"]


def test_an_unknown_action_and_a_strange_key_change_nothing(
    house: House, client: FlaskClient
) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "hold"}
    path = f"/performances/{house.performance_id}"
    assert client.post(path, data=fields | {"key": "a\0b"}).status_code == 400
    assert client.post(path, data=fields | {"action": "zzz"}).status_code == 400
    reservation = client.post(path, data=fields).headers["Location"]
    page = form(client.get(reservation).text)
    assert client.post(reservation, data=page | {"action": "zzz"}).status_code == 400
    assert [event["data"]["status"] for event in house.events()] == ["held"]


def test_a_taken_seat_is_told_on_the_page(house: House, client: FlaskClient) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:2], "action": "hold"}
    order = house.order(house.seat_ids[0])
    client.post("/api/reservations", json=order, headers=bearer("ann"))
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 409
    assert "no longer available" in answer.text
    taken, kept = (f'value="{seat_id}"' for seat_id in house.seat_ids[:2])
    assert re.search(f'{taken} aria-label="1, held" disabled', answer.text)
    assert re.search(f"{kept} checked", answer.text)
    assert len(house.events()) == 1


def test_no_seat_chosen_is_told_on_the_page(house: House, client: FlaskClient) -> None:
    fields = open_seats(house, client) | {"action": "hold"}
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 422
    assert "Please choose 1 to 10 seats." in answer.text


@pytest.mark.parametrize("csrf", [None, "", "guessed"])
def test_a_form_of_another_site_is_refused(
    house: House, client: FlaskClient, csrf: str | None
) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "hold"}
    fields.pop("csrf")
    if csrf is not None:
        fields["csrf"] = csrf
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 403
    assert house.events() == []


def test_the_token_of_another_guest_is_refused(house: House, client: FlaskClient) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "hold"}
    client.delete_cookie("reservation_guest")
    open_seats(house, client)
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 403


def test_another_guest_s_reservation_is_not_shown(house: House, client: FlaskClient) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "hold"}
    held = client.post(f"/performances/{house.performance_id}", data=fields)
    client.delete_cookie("reservation_guest")
    assert client.get(held.headers["Location"]).status_code == 404


@pytest.mark.parametrize(
    ("host", "secure"),
    [("127.0.0.1:8000", False), ("[::1]:8000", False), ("localhost", False),
     ("tickets.example", True), ("192.0.2.1:8000", True), ("127.0.0.1.example", True)],
)  # fmt: skip
def test_the_cookie_is_kept_from_scripts_and_other_sites(
    house: House,
    client: FlaskClient,
    host: str,
    secure: bool,  # noqa: FBT001
) -> None:
    answer = client.get(f"/performances/{house.performance_id}", headers={"Host": host})
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert ("Secure" in cookie) == secure


def test_the_cookie_lets_a_guest_call_the_api_from_the_same_site_alone(
    house: House, client: FlaskClient
) -> None:
    open_seats(house, client)
    order = house.order(house.seat_ids[0])
    foreign = client.post(
        "/api/reservations", json=order, headers={"Origin": "https://evil.example"}
    )
    assert foreign.status_code == 403
    own = client.post("/api/reservations", json=order, headers={"Origin": "http://localhost"})
    assert own.status_code == 201
    assert client.get("/api/reservations").json["items"] == [own.json]  # type: ignore[index]


def test_a_forged_cookie_is_nobody(client: FlaskClient) -> None:
    client.set_cookie("reservation_guest", "eyJndWVzdF9pZCI6ImFubiJ9.aaaaaa.forged")
    assert client.get("/api/reservations").status_code == 401


def test_pages_load_nothing_from_elsewhere_and_have_no_inline_script(
    house: House, client: FlaskClient
) -> None:
    for path in ("/", f"/performances/{house.performance_id}", "/reservations", "/nothing"):
        page = client.get(path).text
        assert set(re.findall("<script.*?>", page)) <= {
            '<script type="module" src="/static/page.js">'
        }
        assert "style=" not in page
        assert not re.search(r'(src|href|action)="(https?:)?//', page)


def test_what_is_not_there_is_a_page(client: FlaskClient) -> None:
    answer = client.get("/performances/9999")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert "There is no such performance." in answer.text
    assert "<h1>There is no such page.</h1>" in client.get("/nothing").text


def test_the_next_concert_is_first_and_what_has_begun_is_left_out(
    house: House, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGE_CONCERTS", 3)
    now = datetime.now(UTC)
    with house.connect() as connection:
        for hours in (72, 24, -1, 48, 24, 96, 120):
            new = concert(starts_at=now + timedelta(hours=hours)) | {"title": f"In {hours} hours"}
            catalogue_changes.publish(connection, NewConcert.model_validate_json(json.dumps(new)))
    path, titles = "/", list[str]()
    while path:
        page = client.get(path).text
        titles += re.findall(r'<h2 id="c\d+">(.*?)</h2>', page)
        more = re.search(r'href="(/\?after=[^"]+)"', page)
        path = more[1] if more else ""
    assert titles == [
        *(f"In {hours} hours" for hours in (24, 24, 48, 72, 96, 120)), "Ein Abend mit Björk"
    ]  # fmt: skip
    for strange in ("7", "-", "9999999999999999-1", "x-1"):
        assert client.get("/", query_string={"after": strange}).status_code == 200


@pytest.mark.parametrize(
    ("currency", "price"),
    [("EUR", "€50.00"), ("RSD", "RSD50.00"), ("KRW", "₩5,000"), ("KWD", "KWD5.000")],
)
def test_a_price_has_the_decimals_of_its_currency(
    house: House, client: FlaskClient, currency: str, price: str
) -> None:
    house.execute("UPDATE concerts SET currency = %s", currency)
    assert f"</i>{price}</li>" in client.get(f"/performances/{house.performance_id}").text


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
@pytest.mark.parametrize("path", ["/", "/nothing", "/api/concerts"])
def test_a_host_that_can_t_be_one_is_400(client: FlaskClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 400
    if path.startswith("/api/"):
        assert answer.json
        assert answer.json["type"] == "malformed-request"


def hold_one(house: House, client: FlaskClient) -> tuple[str, str]:
    """Hold a seat; return the reservation's path and its code."""
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "hold"}
    path = client.post(f"/performances/{house.performance_id}", data=fields).headers["Location"]
    code = re.search(r"<b>([0-9A-Z]{5}-[0-9A-Z]{5})</b>", client.get(path).text)
    assert code
    return path, code[1]


def enter(client: FlaskClient, code: str) -> Any:
    return client.post(
        "/reservations", data=form(client.get("/reservations").text) | {"code": code}
    )


def test_a_guest_finds_the_reservation_on_another_device_by_its_code(
    house: House, client: FlaskClient
) -> None:
    path, code = hold_one(house, client)
    assert code in client.get(path).text, "it stays"
    client.delete_cookie("reservation_guest")
    assert client.get(path).status_code == 404
    misread = code.lower().replace("0", "o").replace("1", "l").replace("-", " ")
    assert enter(client, misread).headers["Location"] == path
    assert "Found by code" in client.get("/reservations").text
    for action, status in (("extend", "held"), ("confirm", "confirmed"), ("cancel", "cancelled")):
        fields = form(client.get(path).text) | {"action": action}
        assert client.post(path, data=fields).status_code == 303
        assert f'"status {status}"' in client.get(path).text


def test_a_wrong_code_says_always_the_same_and_attempts_are_few(
    house: House, client: FlaskClient
) -> None:
    _, code = hold_one(house, client)
    answers = [enter(client, wrong) for wrong in ("", "x", "00000-00000", "\0" * 200, "é" * 10)]
    assert {answer.status_code for answer in answers} == {404}
    assert all("There is no reservation with this code." in answer.text for answer in answers)
    last = answers[-1]
    for _ in range(2 * codes.ATTEMPTS_PER_MINUTE):  # the minute may turn meanwhile
        last = enter(client, "00000-00000")
        client.delete_cookie("reservation_guest")  # another guest is no other address
        if last.status_code == 429:
            break
    assert last.status_code == 429
    assert int(last.headers["Retry-After"]) >= 1
    assert enter(client, code).status_code == 429, "right or wrong"


@pytest.mark.parametrize(
    ("hours", "status", "words"),
    [((48, 1, 2), "scheduled", "On sale from"), ((48, -2, -1), "scheduled", "sale of this"),
     ((-1, -9, -2), "scheduled", "is past"), ((48, -2, 9), "cancelled", "is cancelled")],
)  # fmt: skip
def test_a_performance_that_is_not_on_sale_says_why(
    house: House, client: FlaskClient, hours: tuple[int, int, int], status: str, words: str
) -> None:
    house.execute(
        """
        UPDATE performances SET status = %s, starts_at = now() + %s * interval '1 hour',
            sales_open_at = now() + %s * interval '1 hour',
            sales_close_at = now() + %s * interval '1 hour'
        """,
        status,
        *hours,
    )
    page = client.get(f"/performances/{house.performance_id}").text
    assert words in page
    assert 'name="action"' not in page
    # Who reads "12 of 20 free" there would be misled.
    assert ('id="hall"' in page) == (words not in {"is past", "is cancelled"})
    assert "Choose seats" not in client.get("/").text


def test_a_hall_of_5000_seats_is_small_on_its_way(house: House, client: FlaskClient) -> None:
    house.execute(
        """
        INSERT INTO seats (performance_id, section, "row", number, price)
        SELECT %s, 'Tier ' || tier, "row"::text, number, 10000 - 1000 * tier
        FROM generate_series(1, 5) AS tier, generate_series(1, 25) AS "row",
            generate_series(1, 40) AS number
        """,
        house.performance_id,
    )
    path = f"/performances/{house.performance_id}"
    page = client.get(path, headers={"Accept-Encoding": "gzip"})
    static = Path(pages.__file__).with_name("static")
    beside_it = sum((static / name).stat().st_size for name in ("style.css", "page.js", "icon.svg"))
    assert len(page.data) + beside_it < 100_000
    assert gzip.decompress(page.data).count(b'name="seat_ids"') == 5_000 + len(house.seat_ids)


def test_the_page_s_tag_is_the_api_s(house: House, client: FlaskClient) -> None:
    page = client.get(f"/performances/{house.performance_id}").text
    tag = re.search('data-tag="([0-9a-f]+)"', page)
    assert tag
    poll = client.get(
        f"/api/performances/{house.performance_id}/seats",
        headers={"If-None-Match": f'W/"{tag[1]}"'},
    )
    assert poll.status_code == 304
