"""Korean and English: which one a request wants, and words, times and money in it.

The language is the one chosen with the switch (a cookie), else the one that the browser asks for,
else English. English sentences are in the code and the templates; translations/ko.po has them all
in Korean (a test compares).
"""

from copy import copy
from datetime import datetime
from decimal import Decimal
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from babel.core import Locale
from babel.dates import format_date, format_time, get_timezone_location
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.support import Translations
from flask import g, request

from reservation_service.new_concert import decimals
from reservation_service.problems import KINDS, Problem

COOKIE = "language"
COOKIE_MAX_AGE_S = 365 * 86_400
NAMES = {"en": "English", "ko": "한국어"}
LOCALES = {"en": Locale("en", "GB"), "ko": Locale("ko", "KR")}
# CLDR's short form has AM and PM in Latin letters; who reads Korean expects 오전 and 오후.
CLOCKS = {"ko": "aaaa h:mm"}
TRANSLATIONS = Path(__file__).parent / "translations"


def current() -> str:
    """Return the language of this request: a key of NAMES."""
    if "language" not in g:
        chosen = request.cookies.get(COOKIE, "")
        wanted = request.accept_languages.best_match(NAMES, default="en")
        g.language = chosen if chosen in NAMES else wanted
    return str(g.language)


def translate(text: str, **values: Any) -> str:
    """Return a sentence in the request's language; `values` take the place of %(name)s in it."""
    found = _catalogue(current()).gettext(text)
    return found % values if values else found


def translate_plural(one: str, many: str, number: int) -> str:
    """Return the sentence for so many of something; %(number)s is the number."""
    return _catalogue(current()).ngettext(one, many, number) % {"number": number}


def told(problem: Problem) -> str:
    """Return what happened, in words for the person who books.

    What has figures or ids in it has no translation; what kind of problem it is always has.
    """
    language = _catalogue(current())
    found = language.gettext(problem.detail)
    if found == problem.detail and current() != "en":
        return language.gettext(
            KIND_SENTENCES.get(problem.type, KIND_SENTENCES["malformed-request"])
        )
    return found


def money(amount: int, currency: str) -> str:
    """Write minor units as a price, with the decimals that ISO 4217 gives the currency.

    CLDR leaves them out where nobody pays in coins any more: it would take 89.00 dinars for 8900.
    """
    locale, digits = LOCALES[current()], decimals(currency)
    pattern = copy(locale.currency_formats["standard"])
    pattern.frac_prec = (digits, digits)
    exact = Decimal(amount).scaleb(-digits)
    return str(pattern.apply(exact, locale, currency=currency, currency_digits=False))


def day(value: datetime, time_zone: str) -> str:
    """Write the date as the concert's city has it."""
    return format_date(value.astimezone(ZoneInfo(time_zone)), "full", LOCALES[current()])


def clock(value: datetime, time_zone: str) -> str:
    """Write the time of day as clocks in the concert's city show it."""
    here, locale = value.astimezone(ZoneInfo(time_zone)), LOCALES[current()]
    return format_time(here, CLOCKS.get(current(), "short"), locale=locale)


def moment(value: datetime, time_zone: str) -> str:
    """Write date and time as the concert's city has them."""
    return f"{day(value, time_zone)}, {clock(value, time_zone)}"


def place(time_zone: str) -> str:
    """Return the city whose clocks are meant."""
    return str(get_timezone_location(ZoneInfo(time_zone), LOCALES[current()], return_city=True))


@cache
def _catalogue(language: str) -> Translations:
    if language == "en":
        return Translations()
    with (TRANSLATIONS / f"{language}.po").open("rb") as file:
        catalogue = read_po(file, locale=language, abort_invalid=True)
    compiled = BytesIO()
    write_mo(compiled, catalogue)
    compiled.seek(0)
    return Translations(compiled)


def _(text: str) -> str:
    """Mark a sentence for the catalogue."""
    return text


# What is said where a problem's own sentence has no translation, and what the script says.
KIND_SENTENCES = {
    "malformed-request": _("This could not be understood. Please load the page again."),
    "unauthenticated": _("Your visit is no longer known here. Please load the page again."),
    "forbidden": _("This form is no longer valid. Please open the page again."),
    "not-found": _("There is no such page."),
    "seats-unavailable": _("Some of these seats are no longer available; nothing was reserved."),
    "not-on-sale": _("This performance is not on sale."),
    "customer-limit": _("That would be more seats than one person may have."),
    "wrong-state": _("That is no longer possible: the reservation has changed meanwhile."),
    "request-in-flight": _("Your request is still being worked on."),
    "too-many-writes": _("That was too much at once. Please wait a minute."),
    "internal-error": _("Something went wrong on our side."),
    "unavailable": _("The service is not available. Please try again."),
    "invalid-body": _("Please choose your seats again."),
}
assert KIND_SENTENCES.keys() <= KINDS.keys()  # noqa: S101 - the words are a promise
