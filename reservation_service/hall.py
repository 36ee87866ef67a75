"""A hall as the page draws it: sections of rows of seats, and the prices in a legend."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from reservation_service import language
from reservation_service.catalogue import SeatAnswer
from reservation_service.new_concert import decimals

# So many seats are all unfolded at once; of a bigger hall the first section.
UNFOLDED_SEATS = 1_000


class Place(NamedTuple):
    """A seat in its row; `gap` when numbers are left out before it, `price` its place in prices."""

    seat: SeatAnswer
    gap: bool
    price: int


class Row(NamedTuple):
    """A row; its places by number."""

    name: str
    places: list[Place]


class Section(NamedTuple):
    """A section; `free` counts what is available now."""

    name: str
    rows: list[Row]
    lowest_price: int
    highest_price: int
    free: int
    seats: int


class Plan(NamedTuple):
    """A whole hall; `prices` from the highest on."""

    sections: list[Section]
    prices: list[int]
    currency: str
    decimals: int
    free: int
    unfolded: bool


def plan_of(seats: Sequence[SeatAnswer]) -> Plan:
    """Arrange the seats, which come in the plan's order; a section or a row may come in parts."""
    prices = sorted({seat.price for seat in seats}, reverse=True)
    currency = seats[0].currency if seats else ""
    places = {price: place for place, price in enumerate(prices)}
    by_section: dict[str, list[SeatAnswer]] = {}
    for seat in seats:
        by_section.setdefault(seat.section, []).append(seat)
    sections = [_section(name, of_section, places) for name, of_section in by_section.items()]
    return Plan(
        sections,
        prices,
        currency,
        decimals(currency),
        sum(section.free for section in sections),
        len(seats) <= UNFOLDED_SEATS,
    )


def _section(name: str, seats: list[SeatAnswer], prices: dict[int, int]) -> Section:
    by_row: dict[str, list[SeatAnswer]] = {}
    for seat in seats:
        by_row.setdefault(seat.row, []).append(seat)
    return Section(
        name,
        [Row(row, _places(of_row, prices)) for row, of_row in by_row.items()],
        min(seat.price for seat in seats),
        max(seat.price for seat in seats),
        sum(seat.status == "available" for seat in seats),
        len(seats),
    )


def _places(seats: list[SeatAnswer], prices: dict[int, int]) -> list[Place]:
    ordered = sorted(seats, key=lambda seat: seat.number)
    before = [ordered[0].number - 1] + [seat.number for seat in ordered]
    return [
        Place(seat, seat.number != last + 1, prices[seat.price])
        for seat, last in zip(ordered, before, strict=False)
    ]


def words_of_script() -> dict[str, Any]:
    """Return what the script says, in the request's language."""
    _ = language.translate
    return {
        "held": _("held"),
        "taken": _("taken"),
        "yours": _("yours"),
        "seat": _("%(section)s, row %(row)s, seat %(number)s"),
        "remove": _("Remove %(seat)s"),
        "free": _("%(free)s of %(seats)s free"),
        "none": _("No seats chosen yet."),
        "total": _("Total"),
        "most": _("At most %(most)s seats at a time."),
        "lost": _("Just taken by somebody else: %(seats)s. Your other seats are still chosen."),
        "lostAll": _("Just taken by somebody else: %(seats)s."),
        "waiting": _("One moment…"),
        "offline": _("Connection lost. Trying again…"),
        "live": _("Live"),
        "problems": {kind: _(text) for kind, text in language.KIND_SENTENCES.items()},
        "noSeats": _("There are not so many free seats left."),
    }
