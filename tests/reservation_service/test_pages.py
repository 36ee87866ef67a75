"""The booking page: works without script, and only from its own forms."""

import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.reservation_service.house import House, bearer


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
    assert "held" in page
    assert "100.00 EUR" in page
    for action, status in (("confirm", "confirmed"), ("cancel", "cancelled")):
        done = client.post(
            reservation, data=form(client.get(reservation).text) | {"action": action}
        )
        assert done.status_code == 303
        assert f'"status {status}"' in client.get(reservation).text
    assert "cancelled" in client.get("/reservations").text
    assert [event["data"]["version"] for event in house.events()] == [1, 2, 3]


def test_a_guest_books_in_one_step_and_a_second_click_books_nothing_more(
    house: House, client: FlaskClient
) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "book"}
    path = f"/performances/{house.performance_id}"
    first, second = (client.post(path, data=fields) for _ in range(2))
    assert first.headers["Location"] == second.headers["Location"]
    assert [event["type"] for event in house.events()] == ["reservation.completed"]


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
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:2], "action": "book"}
    order = house.order(house.seat_ids[0])
    client.post("/api/reservations", json=order, headers=bearer("ann"))
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 409
    assert "no longer available" in answer.text
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
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "book"}
    fields.pop("csrf")
    if csrf is not None:
        fields["csrf"] = csrf
    answer = client.post(f"/performances/{house.performance_id}", data=fields)
    assert answer.status_code == 403
    assert house.events() == []


def test_the_token_of_another_guest_is_refused(house: House, client: FlaskClient) -> None:
    fields = open_seats(house, client) | {"seat_ids": house.seat_ids[:1], "action": "book"}
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


def test_pages_load_nothing_from_elsewhere_and_have_no_script(
    house: House, client: FlaskClient
) -> None:
    for path in ("/", f"/performances/{house.performance_id}", "/reservations", "/nothing"):
        page = client.get(path).text
        assert "<script" not in page
        assert "style=" not in page
        assert not re.search(r'(src|href|action)="(https?:)?//', page)


def test_what_is_not_there_is_a_page(client: FlaskClient) -> None:
    answer = client.get("/performances/9999")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert "There is no such performance." in answer.text


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example"])
@pytest.mark.parametrize("path", ["/", "/nothing", "/api/concerts"])
def test_a_host_that_can_t_be_one_is_400(client: FlaskClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 400
    if path.startswith("/api/"):
        assert answer.json
        assert answer.json["type"] == "malformed-request"
