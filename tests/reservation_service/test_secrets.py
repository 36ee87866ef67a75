"""Secrets that others may know are refused before others can reach the service."""

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from flask.sessions import SecureCookieSessionInterface
from flask.testing import FlaskClient
from jwt.algorithms import RSAAlgorithm
from pydantic import SecretStr

from reservation_service import config, jwks
from reservation_service.callers import make_token
from reservation_service.config import ConfigurationError, Settings
from reservation_service.jwks import KeySet
from tests.reservation_service.conftest import MakeClient
from tests.reservation_service.house import SECRET_KEY
from tests.reservation_service.test_commands import run

GOOD_KEY = "T5tqfYv0v1kq6uXb2mC4dJ8hWz3nRg7LpAeSxQyKcUo="
GOOD_TOKEN = "0d2f7c9ab4e15638"
OWN = "/api/reservations"
URL = "postgresql://nobody@127.0.0.1:1/nothing"


@pytest.mark.parametrize(
    ("key", "token", "named"),
    [
        ("x" * 64, None, "RESERVATION_SECRET_KEY"),
        ("please-change-me-please-change-me!", None, "RESERVATION_SECRET_KEY"),
        ("EXAMPLE-9f8e7d6c5b4a39281706f5e4d3c2b1a0", None, "RESERVATION_SECRET_KEY"),
        ("0123456789" * 4, None, "RESERVATION_SECRET_KEY"),
        (SECRET_KEY, None, "RESERVATION_SECRET_KEY"),
        (GOOD_KEY, "admin", "RESERVATION_ADMIN_TOKEN"),
        (GOOD_KEY, "this-is-a-default-token", "RESERVATION_ADMIN_TOKEN"),
    ],
)
def test_no_well_known_secret_beyond_loopback(key: str, token: str | None, named: str) -> None:
    environment = {"RESERVATION_DATABASE_URL": URL, "RESERVATION_SECRET_KEY": key}
    if token:
        environment["RESERVATION_ADMIN_TOKEN"] = token
    settings = Settings(**environment)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=named) as caught:
        settings.check_for_strangers()
    assert key not in str(caught.value)


def test_the_command_refuses_in_one_line_and_only_beyond_loopback() -> None:
    environment = {"RESERVATION_DATABASE_URL": URL, "RESERVATION_SECRET_KEY": "change-me" * 5}
    done = run("serve", "--host", "0.0.0.0", "--port", "0", **environment)  # noqa: S104
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "RESERVATION_SECRET_KEY" in line
    assert "change-me" not in line


def test_random_secrets_are_good_everywhere() -> None:
    Settings(
        RESERVATION_SECRET_KEY=GOOD_KEY,
        RESERVATION_ADMIN_TOKEN=GOOD_TOKEN,
    ).check_for_strangers()
    Settings(RESERVATION_SECRET_KEY=GOOD_KEY).check_for_strangers()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False),  # noqa: S104
     ("", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(
    host: str,
    loopback: bool,  # noqa: FBT001
) -> None:
    assert config.is_loopback(host) == loopback


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}',
     '{"keys": [{"kty": "RSA"}]}'],
)  # fmt: skip
def test_a_key_file_without_a_usable_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    done = run("token", "ann", RESERVATION_SECRET_KEY=GOOD_KEY, RESERVATION_JWKS_FILE=str(file))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "RESERVATION_JWKS_FILE" in line


def test_keys_come_by_http_or_from_a_file_not_both(tmp_path: Path) -> None:
    for environment in (
        {"RESERVATION_JWKS_URL": "ftp://x/"},
        {"RESERVATION_JWKS_URL": "https://x/", "RESERVATION_JWKS_FILE": str(tmp_path / "x")},
    ):
        done = run("token", "ann", RESERVATION_SECRET_KEY=GOOD_KEY, **environment)
        assert (done.returncode, "RESERVATION_JWKS_" in done.stderr) == (2, True)


def test_a_provider_that_is_away_is_not_asked_for_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def away(source: Any) -> Any:
        asked.append(source)
        raise jwt.PyJWKClientConnectionError("away")

    monkeypatch.setattr(jwks, "read", away)
    keys = KeySet("http://127.0.0.1:1/keys")
    assert [keys.find(f"k{number}", "RS256") for number in range(50)] == [None] * 50
    assert len(asked) == 1


def test_keys_by_http_are_fetched_when_an_unknown_one_comes_and_outlive_their_provider(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(key_id: str) -> dict[str, Any]:
        public: dict[str, Any] = json.loads(
            RSAAlgorithm.to_jwk(rsa.generate_private_key(65_537, 2_048).public_key())
        )
        return public | {"kid": key_id}

    keys = [told("old"), told("another") | {"use": "enc"}]

    class Provider(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"keys": keys}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr(jwks, "URL_RETRY_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        threading.Thread(target=server.serve_forever).start()
        key_set = KeySet(f"http://127.0.0.1:{server.server_port}/keys")
        assert key_set.find("old", "RS256")
        assert key_set.find("old", "ES256") is None
        assert key_set.find("another", "RS256") is None, "it is not for signatures"
        assert key_set.find(None, "RS256"), "the only one needs no name"
        keys[:] = [told("new"), told("newer")]
        assert key_set.find("new", "RS256")
        assert key_set.find("old", "RS256") is None
        assert key_set.find(None, "RS256") is None, "which of the two?"
        server.shutdown()
    assert key_set.find("newer", "RS256")
    assert key_set.find("unknown", "RS256") is None
    assert key_set.find("new", "RS256")


def test_what_the_secret_before_has_signed_counts_until_it_is_taken_away(
    make_client: MakeClient,
) -> None:
    before, now = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    old, rotated, alone = (
        make_client(secret_key=before),
        make_client(secret_key=now, previous_secret_key=before),
        make_client(secret_key=now),
    )

    def answers(token: str, cookie: str) -> list[tuple[int, int]]:
        found = []
        for client in (old, rotated, alone):
            by_token = client.get(OWN, headers={"Authorization": f"Bearer {token}"})
            client.set_cookie("reservation_guest", cookie)
            found.append((by_token.status_code, client.get(OWN).status_code))
        return found

    def signed_by(client: FlaskClient) -> str:
        signing = SecureCookieSessionInterface().get_signing_serializer(client.application)
        assert signing
        return str(signing.dumps({"guest_id": "guest-1"}))

    # Cookies are asked for where there is no token.
    good, bad = (200, 200), (401, 401)
    assert answers(make_token("c1", before, 60), signed_by(old)) == [good, good, bad]
    # The new one signs: the old one's holders can't.
    assert answers(make_token("c1", now, 60), signed_by(rotated)) == [bad, good, good]


def test_the_secret_before_is_as_secret_as_the_present_one() -> None:
    with pytest.raises(ConfigurationError, match="RESERVATION_SECRET_KEY_PREVIOUS"):
        Settings(
            secret_key=SecretStr(secrets.token_urlsafe(32)),
            previous_secret_key=SecretStr("change-me-change-me-change-me-change-me"),
        ).check_for_strangers()
