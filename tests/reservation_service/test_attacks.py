"""Attacks on the running service: forged callers, other people's things, hostile input."""

import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask.testing import FlaskClient
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from reservation_service.callers import make_token
from tests.reservation_service.conftest import Serve, Served
from tests.reservation_service.house import ADMIN_TOKEN, SECRET_KEY, House, bearer, concert
from tests.reservation_service.test_api import claims, problem
from tests.waiting import wait_until

ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
NASTY = [
    "'; DROP TABLE seats; --",
    "' OR '1'='1",
    "1); SELECT pg_sleep(10); --",
    "%s %(seat_ids)s {0} ${jndi:ldap://x}",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 77777 * 77777 }}",
    "../../../../etc/passwd",
    "x\r\nSet-Cookie: admin=1",
    "x\n\nHTTP/1.1 200 OK",
    "\u202e\u0000",
    "\U0001d518\U0001f3ad" * 150,
]


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65_537, 2_048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, key_id: str) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    told: dict[str, Any] = json.loads(algorithm.to_jwk(key.public_key()))  # type: ignore[arg-type]
    return told | {"kid": key_id, "use": "sig"}


@pytest.fixture
def key_file(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> Path:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [public(rsa_key, "r1"), public(ec_key, "e1")]}))
    return file


@pytest.fixture
def served(serve: Serve, key_file: Path) -> Served:
    return serve(env={"RESERVATION_JWKS_FILE": str(key_file)})


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield client


def encoded(part: Any) -> str:
    text = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def hmac_signed(header: Any, payload: Any, key: bytes) -> str:
    """A token as PyJWT would refuse to make it."""
    signed = f"{encoded(header)}.{encoded(payload)}"
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def forged(rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Tokens that nobody may be let in with."""
    other_rsa = rsa.generate_private_key(65_537, 2_048)
    pem = rsa_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    jwk = json.dumps(public(rsa_key, "r1")).encode()
    good = jwt.encode(claims(), SECRET_KEY, algorithm="HS256")
    head, body, signature = good.split(".")
    deep = b"[" * 5_000 + b"]" * 5_000

    def by_rsa(key: rsa.RSAPrivateKey, algorithm: str = "RS256", **header: Any) -> str:
        return jwt.encode(claims(), key, algorithm=algorithm, headers={"kid": "r1"} | header)

    return {
        "no signature": f"{encoded({'alg': 'none'})}.{body}.",
        "none, oddly written": f"{encoded({'alg': 'nOnE', 'typ': 'JWT'})}.{body}.{signature}",
        "signature cut off": f"{head}.{body}.",
        "another body": f"{head}.{encoded(claims(sub='eve'))}.{signature}",
        "public key as the secret": hmac_signed({"alg": "HS256", "kid": "r1"}, claims(), pem),
        "key set as the secret": hmac_signed({"alg": "HS256", "kid": "r1"}, claims(), jwk),
        "empty secret": hmac_signed({"alg": "HS256"}, claims(), b""),
        "another's RSA key": by_rsa(other_rsa),
        "unknown key id": by_rsa(rsa_key, kid="r2"),
        "an RSA key for PS256": by_rsa(rsa_key, "PS256"),
        "an RSA key for RS512": by_rsa(rsa_key, "RS512"),
        "EC signature with the RSA key's id": jwt.encode(
            claims(), ec_key, algorithm="ES256", headers={"kid": "r1"}
        ),
        "a key that it brings along": by_rsa(other_rsa, jwk=public(other_rsa, "r1")),
        "a key that it points to": by_rsa(other_rsa, jku="http://127.0.0.1:1/"),
        "expired": jwt.encode(claims(exp=int(time.time()) - 1), rsa_key, "RS256", {"kid": "r1"}),
        "for others": jwt.encode(claims(aud="x"), rsa_key, "RS256", {"kid": "r1"}),
        "for nobody": jwt.encode(claims(aud=None), ec_key, "ES256", {"kid": "e1"}),
        "for ever": jwt.encode(claims(exp=None), ec_key, "ES256", {"kid": "e1"}),
        "not yet": jwt.encode(claims(nbf=int(time.time()) + 600), ec_key, "ES256", {"kid": "e1"}),
        "a list for a header": f"{encoded([])}.{body}.{signature}",
        "a number for a key id": hmac_signed({"alg": "RS256", "kid": 1}, claims(), b"x" * 32),
        "a nested header": f"{encoded(deep[:2_000] + deep[-2_000:])}.{body}.{signature}",
        "an algorithm that is a list": hmac_signed({"alg": ["HS256"]}, claims(), b"x" * 32),
        "the admin's, but for its end": ADMIN_TOKEN[:-1],
        "more dots": f"{good}.{signature}",
        "not even that": "x" * 4_000,
    }


def test_forged_tokens_let_nobody_in(
    http: httpx.Client, rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    for key, kid, algorithm in ((rsa_key, "r1", "RS256"), (ec_key, "e1", "ES256")):
        good = jwt.encode(claims(), key, algorithm=algorithm, headers={"kid": kid})
        answer = http.get("/api/reservations", headers={"Authorization": f"Bearer {good}"})
        assert answer.status_code == 200, algorithm
    for name, token in forged(rsa_key, ec_key).items():
        answer = http.get("/api/reservations", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401, name
        assert answer.json()["detail"] == "The token is not valid.", name


def test_a_key_may_be_rotated_while_the_service_runs(
    http: httpx.Client, key_file: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    new = rsa.generate_private_key(65_537, 2_048)

    def status(key: rsa.RSAPrivateKey, key_id: str) -> int:
        token = jwt.encode(claims(), key, algorithm="RS256", headers={"kid": key_id})
        found = http.get("/api/reservations", headers={"Authorization": f"Bearer {token}"})
        return found.status_code

    assert (status(rsa_key, "r1"), status(new, "r2")) == (200, 401)
    key_file.write_text(json.dumps({"keys": [public(new, "r2"), public(rsa_key, "r1")]}))
    wait_until(lambda: status(new, "r2") == 200, 20, "the new key")
    key_file.write_text("half a fi")
    assert status(new, "r2") == 200, "the last known keys go on"
    key_file.write_text(json.dumps({"keys": [public(new, "r2")]}))
    wait_until(lambda: {status(rsa_key, "r1") for _ in range(8)} == {401}, 20, "the old key's end")
    assert status(new, "r2") == 200


def test_other_customers_reservations_do_not_exist(house: House, http: httpx.Client) -> None:
    order = house.order(house.seat_ids[0])
    made = http.post("/api/reservations", json=order, headers=bearer("ann")).json()
    path = f"/api/reservations/{made['reservation_id']}"
    nowhere = "/api/reservations/00000000-0000-7000-8000-000000000000"
    http.get(f"/performances/{house.performance_id}")
    assert http.cookies, "a guest"
    own = {"Origin": str(http.base_url)}
    for headers in (bearer("eve"), bearer("ANN"), bearer("ann."), own):
        for method, action in (("GET", ""), *(("POST", a) for a in ("/confirm", "/cancel",
                                                                    "/extend"))):  # fmt: skip
            theirs = http.request(method, path + action, headers=headers)
            missing = http.request(method, nowhere + action, headers=headers)
            assert theirs.status_code == 404
            assert theirs.json() == missing.json(), "nothing tells that it exists"
        assert http.get("/api/reservations", headers=headers).json()["items"] == []
    assert [event["data"]["version"] for event in house.events()] == [1]


def test_a_cookie_that_was_tampered_with_is_nobody_s(house: House, http: httpx.Client) -> None:
    http.get(f"/performances/{house.performance_id}")
    cookie = http.cookies["reservation_guest"]
    assert http.get("/api/reservations").status_code == 200
    payload, stamp, signature = cookie.rsplit(".", 2)
    content = encoded({"guest_id": "ann", "csrf": "x"})
    for tampered in (
        f"{content}.{stamp}.{signature}",
        f"{payload}.{stamp}.{signature[:-1]}",
        f"{payload}.{stamp[::-1]}.{signature}",
        f"{content}.{stamp}.",
        content,
        "." * 50,
        "x" * 3_000,
    ):
        headers = {"Cookie": f"reservation_guest={tampered}"}
        with httpx.Client(base_url=http.base_url) as stranger:
            answer = stranger.get("/api/reservations", headers=headers)
            assert answer.status_code == 401, tampered


def test_the_cookie_is_kept_from_scripts_other_sites_and_open_lines(
    house: House, http: httpx.Client
) -> None:
    path = f"/performances/{house.performance_id}"
    here = http.get(path).headers["Set-Cookie"]
    there = http.get(path, headers={"Host": "tickets.example", "Cookie": ""}).headers["Set-Cookie"]
    for cookie in (here, there):
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
    assert "Secure" not in here
    assert "Secure" in there


def test_another_site_can_do_nothing_with_the_cookie(house: House, http: httpx.Client) -> None:
    http.get(f"/performances/{house.performance_id}")
    order = house.order(house.seat_ids[0])
    best = f"/api/performances/{house.performance_id}/best-available"
    for origin in ("https://evil.example", "null", f"{http.base_url}.evil.example", "x"):
        for path, body in (("/api/reservations", order), (best, {"count": 1})):
            answer = http.post(path, json=body, headers={"Origin": origin})
            assert answer.status_code == 403, origin
    assert house.events() == []
    own = str(http.base_url)
    assert http.post(best, json={"count": 1}, headers={"Origin": own}).status_code == 201


def test_hostile_text_in_every_field_changes_and_breaks_nothing(
    house: House, http: httpx.Client
) -> None:
    seat, performance = house.seat_ids[0], house.performance_id
    before = house.execute("SELECT count(*) AS n FROM seats")
    began_s = time.monotonic()
    for text in NASTY:
        # What can't stand in a header or a URL as it is goes there escaped.
        latin = "".join(one for one in text if one.isascii() and one.isprintable())
        quoted = quote(text, safe="")
        calls = [
            http.get(f"/api/concerts/{quoted}"),
            http.get(f"/api/performances/{quoted}/seats"),
            http.get(f"/performances/{quoted}"),
            http.get(f"/api/reservations/{quoted}", headers=bearer("ann")),
            http.get("/api/concerts", params={"limit": text}),
            http.get("/api/concerts", params={"cursor": text}),
            http.get("/api/reservations", params={"cursor": text}, headers=bearer("ann")),
            http.get("/api/concerts", headers={"Authorization": latin.strip() or "x"}),
            http.get("/", headers={"Accept-Language": latin, "If-None-Match": latin}),
            http.post("/api/reservations", json={text: text}, headers=bearer("ann")),
            *(
                http.post("/api/reservations", json=house.order(seat) | change,
                          headers=bearer("ann"))
                for change in ({"seat_ids": [text]}, {"performance_id": text}, {"confirm": text})
            ),
            http.post(f"/api/performances/{performance}/best-available",
                      json={"count": text}, headers=bearer("ann")),
            http.post("/api/reservations", data={"seat_ids": text}, headers=bearer("ann")),
            http.post(f"/performances/{performance}", data={"csrf": text, "seat_ids": text}),
        ]  # fmt: skip
        for answer in calls:
            told = (text, str(answer.request.url), answer.text)
            assert answer.status_code in {200, 400, 401, 403, 404, 422}, told
            assert "set-cookie" not in answer.headers or "admin" not in str(answer.headers), told
            assert "<script>alert" not in answer.text or "json" in answer.headers["Content-Type"]
            assert "<img src=x" not in answer.text or "json" in answer.headers["Content-Type"]
    assert time.monotonic() - began_s < 60, "nothing slept"
    assert house.execute("SELECT count(*) AS n FROM seats") == before
    assert house.events() == []


# What a template would make of one of the names; no token holds so many digits by chance.
PRODUCT = str(77_777 * 77_777)


def test_what_an_admin_calls_a_concert_is_text_and_nothing_else(http: httpx.Client) -> None:
    names = [text for text in NASTY if text.isprintable() and len(text) < 60]
    for text in names:
        body: Any = concert(seats=1) | {"title": text, "venue": text}
        body["performances"][0]["sections"][0] |= {
            "section": text, "rows": [{"row": text, "seats": 1}],
        }  # fmt: skip
        made = http.post("/api/concerts", json=body, headers=ADMIN)
        assert made.status_code == 201, made.text
        assert (made.json()["title"], made.json()["venue"]) == (text, text)
        performance_id = made.json()["performances"][0]["performance_id"]
        (seat,) = http.get(f"/api/performances/{performance_id}/seats").json()["seats"]
        assert (seat["section"], seat["row"]) == (text, text)
        for page in ("/", f"/performances/{performance_id}"):
            html = http.get(page).text
            assert "<script>alert" not in html
            assert "<img src=x" not in html
            assert PRODUCT not in html


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"performance_id":1,"seat_ids":[' + b"[" * 30_000 + b"]" * 30_000 + b"]}",
        b'{"performance_id":' + b"9" * 60_000 + b',"seat_ids":[1]}',
        b'{"performance_id":1e400,"seat_ids":[1]}',
        b'{"performance_id":1,"seat_ids":[' + b"1," * 30_000 + b"1]}",
        b'{"performance_id":NaN,"seat_ids":[1]}',
        b'{"performance_id":1,"performance_id":2,"seat_ids":[1],"x":"\\ud800"}',
        b"\xff\xfe" + '{"performance_id":1}'.encode("utf-16-le"),
        b"\x00",
    ],
)
def test_bodies_made_to_hurt_are_refused_quickly(client: Any, body: bytes) -> None:
    began_s = time.monotonic()
    answer = client.post("/api/reservations", data=body, headers=bearer("ann"))
    assert answer.status_code in {400, 422}
    assert len(answer.data) < 20_000
    assert time.monotonic() - began_s < 5


def test_a_cursor_that_was_made_by_somebody_else_is_refused_or_harmless(
    house: House, http: httpx.Client
) -> None:
    order = house.order(house.seat_ids[0])
    http.post("/api/reservations", json=order, headers=bearer("ann"))
    hostile = ["-1", "9" * 19, "9" * 30, " 1", "\uff11", "1;--", "0x1", "", "\x00", "null", "[1]",
               "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
               "{ffffffff-ffff-ffff-ffff-ffffffffffff}", "urn:uuid:x"]  # fmt: skip
    for text in hostile:
        cursor = base64.urlsafe_b64encode(text.encode()).decode()
        for path in ("/api/concerts", "/api/reservations"):
            answer = http.get(path, params={"cursor": cursor}, headers=bearer("eve"))
            assert answer.status_code in {200, 400}, text
            if answer.status_code == 200 and path == "/api/reservations":
                assert answer.json()["items"] == [], "another's"


def test_requests_that_are_no_http_end_without_harm_or_a_word_of_secrets(served: Served) -> None:
    secret = bearer("ann")["Authorization"]
    post = "POST /api/reservations HTTP/1.1\r\nHost: x\r\n"
    for text in (
        "GET / HTTP/9.9\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization : {secret}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization\r\n {secret}\r\n\r\n",
        f"{post}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        f"{post}Content-Length: 1\r\nContent-Length: 2\r\n\r\nabc",
        f"{post}Content-Length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\n" + "X: y\r\n" * 500 + "\r\n",
        f"GET /{'x' * 20_000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nX: {'y' * 50_000}\r\n\r\n",
        "\x16\x03\x01\x02\x00",
        "\x00" * 200_000,
    ):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
            client.sendall(text.encode("latin-1"))
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(4_096)
            assert answer == b"" or answer.split(b" ")[1].startswith((b"4", b"5")), text[:80]
            assert b" 500 " not in answer.split(b"\r\n")[0], text[:80]
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    served.process.stop()
    log = served.process.log.read_text()
    assert secret.split()[1] not in log
    assert "Traceback" not in log


def test_the_log_tells_where_it_failed_and_not_whose_data_it_was(
    house: House, serve: Serve
) -> None:
    served = serve()
    house.execute("ALTER TABLE reservations ADD CHECK (customer_id <> 'private-person')")
    order = house.order(house.seat_ids[0])
    url = f"{served.url}/api/reservations"
    answer = httpx.post(url, json=order, headers=bearer("private-person"))
    problem_of = answer.json()
    assert (answer.status_code, problem_of["type"]) == (500, "internal-error")
    served.process.stop()
    log = served.process.log.read_text()
    (line,) = [json.loads(line) for line in log.splitlines() if "a request failed" in line]
    assert (line["error"], line["sqlstate"]) == ("CheckViolation", "23514")
    assert any("booking.py" in frame for frame in line["frames"])
    assert "private-person" not in log


def test_nobody_guesses_the_admin_s_token_from_the_answer(client: Any) -> None:
    for token in (ADMIN_TOKEN[:5], ADMIN_TOKEN + "x", ADMIN_TOKEN.upper(), "ä" * 10):
        headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")}
        answer = client.post("/api/concerts", json=concert(), headers=headers)
        problem(answer, 401, "unauthenticated")


def test_a_token_that_was_good_is_not_when_its_time_is_over(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": f"Bearer {make_token('ann', SECRET_KEY, 60)}"}
    assert client.get("/api/reservations", headers=headers).status_code == 200
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 61)
    assert client.get("/api/reservations", headers=headers).status_code == 401
