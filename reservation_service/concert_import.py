"""Publish a concert from a file: JSON as `POST /api/concerts` takes it, or CSV from a spreadsheet.

Guarantees: all of it or nothing. What is wrong is told by line or member before anything is
written. The same file makes one concert, however often and by however many it is imported, and one
that has been edited since is not mistaken for another concert. docs/api.md describes the files.

A CSV file has the concert first, then the seats, which all performances have:

    title,An evening with Bach
    venue,Town hall
    time_zone,Europe/Berlin
    currency,EUR
    performance,2027-05-01 19:30,2027-01-10 10:00,2027-05-01 18:30
    section,row,seats,price
    Stalls,A,1-20,89.00
"""

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import msgspec
from pydantic import TypeAdapter, ValidationError

from reservation_service import catalogue_changes, sql
from reservation_service.database import Connection
from reservation_service.new_concert import (
    MAX_NUMBER,
    MAX_SEATS_PER_CONCERT,
    MAX_SEATS_PER_PART,
    MAX_SECTIONS,
    About,
    NewConcert,
    NewPerformance,
    NewRow,
    NewSection,
    ShortText,
    Times,
    decimals,
)

FILE_MAX_BYTES = 16_777_216
RANGES, ONE_BY_ONE = ["section", "row", "seats", "price"], ["section", "row", "number", "price"]
TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?", re.ASCII)
NUMBERS = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?", re.ASCII)
PRICE = re.compile(r"\d{1,9}(?:\.(\d+))?", re.ASCII)
NAME = TypeAdapter[str](ShortText)


class FileError(ValueError):
    """The file can't be read as a concert; the message is one line that says where and why."""


class Imported(NamedTuple):
    """The concert, and whether it was there before."""

    concert_id: int
    known: bool


class AlreadyThereError(Exception):
    """Another concert has this title, venue and a start in common."""

    def __init__(self, concert_id: int) -> None:
        super().__init__(f"concert {concert_id} has this title, this venue and one of these starts")
        self.concert_id = concert_id


def publish_once(
    connection: Connection, concert: NewConcert, traceparent: str | None = None
) -> Imported:
    """Publish a concert, unless the same file has been imported already.

    Raises:
        AlreadyThereError: no, but one that looks like an earlier version of it.
        Problem: 422 its event would be larger than the topic takes.
    """
    told = fingerprint(concert)
    looked_for = {
        "fingerprint": told,
        "title": concert.title,
        "venue": concert.venue,
        "starts_at": [performance.starts_at for performance in concert.performances],
    }
    with connection.transaction():
        connection.execute(sql.LOCK_IMPORTS)
        found = connection.execute(sql.FIND_IMPORTED, looked_for).fetchone()
        if found and not found[1]:
            raise AlreadyThereError(found[0])
        if found:
            return Imported(found[0], known=True)
        concert_id = catalogue_changes.insert(connection, concert, told, traceparent)
    return Imported(concert_id, known=False)


def summary(concert: NewConcert) -> str:
    """Say in a line what will be sold, so that a mistake in a plan is seen."""
    prices = [part.price for one in concert.performances for part in one.parts()]
    scale = -decimals(concert.currency)
    least, most = (f"{Decimal(price).scaleb(scale):f}" for price in (min(prices), max(prices)))
    seats = ", ".join(f"{one.starts_at:%F %R} UTC: {one.capacity}" for one in concert.performances)
    return f"{concert.title}, {least} to {most} {concert.currency}, seats: {seats}"


def fingerprint(concert: NewConcert) -> bytes:
    """Return what tells one concert from another, whatever kind of file it comes from."""
    performances = [
        (one.starts_at, one.sales_open_at, one.sales_close_at, list(one.parts()))
        for one in concert.performances
    ]
    about = concert.model_dump(include=set(About.model_fields))
    return hashlib.sha256(msgspec.json.encode([about, performances])).digest()


def read(path: Path) -> NewConcert:
    """Read a file.

    Raises:
        FileError: it is no concert, or larger than 16 MiB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path.name}: {error.strerror}") from None
    if len(content) > FILE_MAX_BYTES:
        raise FileError(f"{path.name}: expected at most {FILE_MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path.name}:{line}: expected UTF-8 (Excel: save as CSV UTF-8)") from None
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _read_json(path.name, text)
    return _Sheet(path.name, text).read()


def _read_json(name: str, text: str) -> NewConcert:
    try:
        return NewConcert.model_validate_json(text)
    except ValidationError as error:
        raise FileError(f"{name}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """Tell the first of pydantic's errors in one line, without what was in the file."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(str(part) for part in errors[0]["loc"])
    said = errors[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(f"{where + ': ' if where else ''}{said}{more}".split())


class _Part(NamedTuple):
    """Seats side by side in one row at one price, from number `first` to `last`."""

    row: str
    first: int
    last: int
    price: int


class _Sheet:
    """A CSV file while it is read; `line` is where we are."""

    def __init__(self, name: str, text: str) -> None:
        # Whatever this spreadsheet separates by follows the first word.
        separator = next((sign for sign in text[:60] if sign in ",;\t"), ",")
        self.sheet = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        self.name = name
        self.line = 1
        self.head: dict[str, str] = {}
        self.head_lines: dict[str, int] = {}
        self.evenings: list[tuple[int, list[str]]] = []
        self.performances: list[Times] = []
        self.currency_decimals = 0
        self.parts: dict[str, list[_Part]] = {}
        self.numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.seats = 0

    def read(self) -> NewConcert:
        try:
            rows = self._filled()
            one_by_one = self._read_head(rows)
            for row in rows:
                self._read_seats(row, one_by_one=one_by_one)
        except csv.Error as error:
            self._refuse("", f"{error}", self.sheet.line_num)
        return self._concert()

    def _filled(self) -> Iterator[list[str]]:
        for row in self.sheet:
            self.line = self.sheet.line_num
            values = [value.strip() for value in row]
            while values and not values[-1]:  # spreadsheets fill lines up with empty cells
                values.pop()
            if values:
                yield values

    def _refuse(self, what: str, message: str, line: int | None = None) -> NoReturn:
        where = f"{self.name}:{line or self.line}: "
        raise FileError(f"{where}{what}{': ' if what else ''}{message}") from None

    def _read_head(self, rows: Iterator[list[str]]) -> bool:
        """Read down to the columns' names; return whether seats are told one by one."""
        for row in rows:
            if row in (RANGES, ONE_BY_ONE):
                self._check_head()
                return row == ONE_BY_ONE
            self._read_head_line(*row)
        return self._refuse("", f"expected the line {','.join(RANGES)} and the seats below it")

    def _read_head_line(self, word: str, *values: str) -> None:
        if word == "performance":
            if len(values) != len(Times.model_fields):
                self._refuse(word, f"expected {', '.join(Times.model_fields)}")
            self.evenings.append((self.line, list(values)))
        elif word not in About.model_fields:
            known = ", ".join([*About.model_fields, "performance"])
            self._refuse("", f"expected {known} or the line {','.join(RANGES)}")
        elif word in self.head:
            self._refuse(word, "is told twice")
        elif len(values) != 1:
            self._refuse(word, "expected one value (in quotes where the separator is part of it)")
        else:
            self.head[word], self.head_lines[word] = values[0], self.line

    def _check_head(self) -> None:
        missing = [name for name in [*About.model_fields] if name not in self.head]
        if missing or not self.evenings:
            self._refuse((missing or ["performance"])[0], "is missing above this line")
        try:
            about = About.model_validate(self.head)
        except ValidationError as error:
            line = self.head_lines[str(error.errors()[0]["loc"][0])]
            self._refuse("", _first(error), line)
        self.currency_decimals = decimals(about.currency)
        zone = ZoneInfo(about.time_zone)
        for line, texts in self.evenings:
            self.line = line
            times = {
                name: self._time(name, text, zone)
                for name, text in zip(Times.model_fields, texts, strict=True)
            }
            try:
                self.performances.append(Times.model_validate(times))
            except ValidationError as error:
                self._refuse("", _first(error))

    def _time(self, what: str, text: str, zone: ZoneInfo) -> datetime:
        try:
            time = datetime.fromisoformat(text) if TIME.fullmatch(text) else None
        except ValueError:
            time = None
        if time is None:
            self._refuse(
                what, f"expected a time like 2027-05-01 19:30, in {zone.key} or with +02:00"
            )
        if time.tzinfo is None:
            time = time.replace(tzinfo=zone)
            # In the night when clocks change, some times come twice and some never.
            if time.utcoffset() != time.replace(fold=1).utcoffset():
                self._refuse(
                    what, f"clocks in {zone.key} change then; give the offset, like +02:00"
                )
        return time

    def _read_seats(self, row: list[str], *, one_by_one: bool) -> None:
        if len(row) != len(RANGES):
            self._refuse("", f"expected {len(RANGES)} values, found {len(row)}")
        section, name, numbers, price_text = row
        for what, text in (("section", section), ("row", name)):
            try:
                NAME.validate_python(text)
            except ValidationError as error:
                self._refuse(what, _first(error))
        price = self._price(price_text)
        if section not in self.parts and len(self.parts) == MAX_SECTIONS:
            self._refuse("section", f"expected at most {MAX_SECTIONS} sections")
        for first, last in self._ranges(numbers, one_by_one=one_by_one):
            self._add(section, _Part(name, first, last, price))

    def _price(self, text: str) -> int:
        found = PRICE.fullmatch(text)
        if not found or len(found[1] or "") > self.currency_decimals:
            example = f"{Decimal(8_950).scaleb(-self.currency_decimals):f}"
            self._refuse("price", f"expected a price in {self.head['currency']} like {example}")
        return int(Decimal(text).scaleb(self.currency_decimals))

    def _ranges(self, text: str, *, one_by_one: bool) -> Iterator[tuple[int, int]]:
        """Read `20` (seats 1 to 20), `5-24` or `1-9 11-19`; one by one, `20` is seat 20."""
        expected = "expected a number" if one_by_one else "expected 20, 5-24 or 1-9 11-19"
        for part in text.split():
            found = NUMBERS.fullmatch(part)
            if not found or (one_by_one and found[2]):
                self._refuse("number" if one_by_one else "seats", expected)
            first, last = int(found[1]), int(found[2] or found[1])
            if not found[2] and not one_by_one:
                first = 1
            if not 1 <= first <= last <= MAX_NUMBER:
                self._refuse("number" if one_by_one else "seats", f"{expected}, up to {MAX_NUMBER}")
            yield first, last
        if not text:
            self._refuse("number" if one_by_one else "seats", expected)

    def _add(self, section: str, part: _Part) -> None:
        self.seats += (part.last - part.first + 1) * len(self.performances)
        if self.seats > MAX_SEATS_PER_CONCERT:
            self._refuse("", f"expected at most {MAX_SEATS_PER_CONCERT} seats in all performances")
        known = self.numbers[section, part.row]
        wanted = range(part.first, part.last + 1)
        if not known.isdisjoint(wanted):
            number = min(known.intersection(wanted))
            self._refuse("", f"section {section!r}, row {part.row!r} has seat {number} twice")
        known.update(wanted)
        parts = self.parts.setdefault(section, [])
        if parts and _continues(parts[-1], part):
            parts[-1] = parts[-1]._replace(last=part.last)
        else:
            parts.append(part)

    def _concert(self) -> NewConcert:
        if not self.parts:
            self._refuse("", "expected seats below this line")
        sections = [
            NewSection(section=name, price=parts[0].price, rows=list(_rows(parts)))
            for name, parts in self.parts.items()
        ]
        performances = [
            NewPerformance(**times.model_dump(), sections=sections) for times in self.performances
        ]
        return NewConcert.model_validate(self.head | {"performances": performances})


def _continues(one: _Part, other: _Part) -> bool:
    return (one.row, one.last + 1, one.price) == (other.row, other.first, other.price)


def _rows(parts: Iterable[_Part]) -> Iterator[NewRow]:
    for part in parts:
        for first in range(part.first, part.last + 1, MAX_SEATS_PER_PART):
            seats = min(MAX_SEATS_PER_PART, part.last + 1 - first)
            yield NewRow(row=part.row, first=first, seats=seats, price=part.price)
