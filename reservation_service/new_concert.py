"""What an organiser says of a concert and its seats, checked before anything is written."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, NamedTuple, Self
from zoneinfo import available_timezones

from babel.core import get_global
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

# Bounds that keep one call's transaction short and its event well under the topic's limit.
MAX_SEATS_PER_CONCERT = 100_000
MAX_SECTIONS = 50
MAX_SEATS_PER_PART = 500
MAX_NUMBER = 1_000_000
MAX_PRICE = 1_000_000_000_000
# ISO 4217. All others have two.
WITHOUT_DECIMALS = frozenset(
    {"BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI"}
    | {"VND", "VUV", "XAF", "XOF", "XPF"}
)
WITH_THREE_DECIMALS = frozenset({"BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"})
EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


def _in_range(value: datetime) -> datetime:
    if not EARLIEST <= value <= LATEST:
        raise ValueError("expected a time between 2000 and 2200")
    return value.astimezone(UTC)  # one moment, one text: the same concert has one fingerprint


def _time_zone(value: str) -> str:
    # The two that mean whatever this machine says.
    if value not in available_timezones() - {"localtime", "Factory"}:
        raise ValueError("expected an IANA time zone like Europe/Berlin")
    return value


def _currency(value: str) -> str:
    if value not in get_global("all_currencies"):
        raise ValueError("expected a currency of ISO 4217 like EUR")
    return value


NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=NO_CONTROLS, strip_whitespace=True),
]
ShortText = Annotated[
    str,
    StringConstraints(min_length=1, max_length=60, pattern=NO_CONTROLS, strip_whitespace=True),
]
Time = Annotated[AwareDatetime, AfterValidator(_in_range)]
Price = Annotated[int, Field(ge=0, le=MAX_PRICE)]


class RowPart(NamedTuple):
    """Seats side by side: `seats` of them, numbered from `first` on, at `price` each."""

    section: str
    row: str
    first: int
    seats: int
    price: int


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NewRow(_Body):
    """Seats of a row, numbered from `first` on; one row may come in several parts.

    `price`, in minor units, is the section's unless it is given.
    """

    row: ShortText
    seats: int = Field(ge=1, le=MAX_SEATS_PER_PART)
    first: int = Field(1, ge=1, le=MAX_NUMBER)
    price: Price | None = None


class NewSection(_Body):
    """A section whose seats cost `price` minor units, unless their row says otherwise."""

    section: ShortText
    price: Price
    rows: list[NewRow] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row in self.rows:
            parts[row.row].append((row.first, row.first + row.seats))
        for name, of_row in parts.items():
            of_row.sort()
            for (_, end), (begin, _) in pairwise(of_row):
                if begin < end:
                    raise ValueError(f"row {name!r} has seat {begin} twice")
        return self


class Times(_Body):
    """When a performance begins, and from when until when its seats are sold."""

    starts_at: Time
    sales_open_at: Time
    sales_close_at: Time

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.sales_close_at <= self.sales_open_at:
            raise ValueError("sales_close_at: expected a time after sales_open_at")
        return self


class NewPerformance(Times):
    """One evening with its sales window and its seats."""

    sections: list[NewSection] = Field(min_length=1, max_length=MAX_SECTIONS)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = Counter(section.section for section in self.sections)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"section {twice[0]!r} is named twice")
        return self

    @property
    def capacity(self) -> int:
        """Number of seats."""
        return sum(row.seats for section in self.sections for row in section.rows)

    def parts(self) -> Iterator[RowPart]:
        """Yield all seats in the order of the plan."""
        for section in self.sections:
            for row in section.rows:
                price = section.price if row.price is None else row.price
                yield RowPart(section.section, row.row, row.first, row.seats, price)


class About(_Body):
    """What is said of a concert as a whole."""

    title: Text
    venue: Text
    time_zone: Annotated[str, Field(max_length=64), AfterValidator(_time_zone)]
    currency: Annotated[
        str, AfterValidator(_currency), WithJsonSchema({"type": "string", "pattern": "^[A-Z]{3}$"})
    ]


class NewConcert(About):
    """A concert as the admin sends it."""

    performances: list[NewPerformance] = Field(min_length=1, max_length=20)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if sum(performance.capacity for performance in self.performances) > MAX_SEATS_PER_CONCERT:
            raise ValueError(f"expected at most {MAX_SEATS_PER_CONCERT} seats in all")
        return self


class ConcertChange(_Body):
    """What shall be different about a concert; what isn't given stays."""

    title: Text | None = None
    venue: Text | None = None


class PerformanceChange(_Body):
    """What shall be different about a performance; what isn't given stays."""

    starts_at: Time | None = None
    sales_open_at: Time | None = None
    sales_close_at: Time | None = None


def decimals(currency: str) -> int:
    """Return how many decimals a price in this currency has."""
    return 0 if currency in WITHOUT_DECIMALS else 3 if currency in WITH_THREE_DECIMALS else 2
