"""Korean and English: every sentence has both, and the browser or the switch says which."""

import re
from pathlib import Path

import pytest
from babel.messages.extract import DEFAULT_KEYWORDS, extract_from_dir
from babel.messages.pofile import read_po
from flask.testing import FlaskClient

import reservation_service
from tests.reservation_service.house import House

PACKAGE = Path(reservation_service.__file__).parent
METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
# The page's own problems that have no figures in them, so that they are translated word for word.
DETAILS = {
    "There is no such performance.",
    "There is no such reservation.",
    "There is no reservation with this code.",
    "Too many attempts. Please wait a minute.",
    "The performance is cancelled.",
    "The performance is past.",
    "The performance is not on sale at this time.",
    "It is sold out.",
}


def sentences() -> set[str]:
    """All that code and templates say."""
    keywords = DEFAULT_KEYWORDS | {"_n": (1, 2), "translate": None, "translate_plural": (1, 2)}
    found = extract_from_dir(PACKAGE, METHODS, keywords=keywords)
    return {str(one[0] if isinstance(one, tuple) else one) for _, _, one, _, _ in found} | DETAILS


def test_every_sentence_has_a_korean_one_with_the_same_values_in_it() -> None:
    with (PACKAGE / "translations/ko.po").open("rb") as file:
        catalogue = read_po(file, locale="ko", abort_invalid=True)
    korean: dict[str, str] = {}
    for message in catalogue:
        if message.id:
            one = message.id if isinstance(message.id, str) else message.id[0]
            text = message.string or ""
            korean[one] = text if isinstance(text, str) else text[0]
    assert korean.keys() == sentences()
    for english, text in korean.items():
        assert text, english
        assert values(text) == values(english), english


def values(text: str) -> list[str]:
    return sorted(re.findall(r"%\(\w+\)s", text))


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [("ko-KR,ko;q=0.9,en;q=0.5", "ko"), ("en-US", "en"), ("fr-FR", "en"), ("fr, ko;q=0.1", "ko")],
)
def test_the_browser_says_which_language(client: FlaskClient, accepted: str, expected: str) -> None:
    answer = client.get("/", headers={"Accept-Language": accepted})
    assert f'<html lang="{expected}">' in answer.text
    assert answer.headers["Content-Language"] == expected
    assert "Accept-Language" in answer.headers["Vary"]


def test_the_switch_is_remembered_and_stronger(house: House, client: FlaskClient) -> None:
    path = f"/performances/{house.performance_id}"
    answer = client.get(f"{path}?lang=ko")
    assert (answer.status_code, answer.headers["Location"]) == (303, path)
    page = client.get(path, headers={"Accept-Language": "en"}).text
    assert "좌석" in page
    assert "베를린" in page
    assert "€50.00" in page
    assert re.search("오[전후] 1?[0-9]:[0-5][0-9]", page)
    assert not re.search("[AP]M", page)
    assert "찾을 수 없" in client.get("/performances/9999").text
    assert "공연을 찾을 수 없" in client.get("/performances/9999").text


def test_an_unknown_language_changes_nothing(client: FlaskClient) -> None:
    answer = client.get("/?lang=xx")
    assert answer.status_code == 200
    client.set_cookie("language", "../../etc")
    assert '<html lang="en">' in client.get("/").text
