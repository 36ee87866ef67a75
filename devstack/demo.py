"""`make demo`: thousands of bookings over HTTP, followed into the analysts' tables."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from devstack.application import Application, get_json
from devstack.audit import STATUSES, Audit, audit
from devstack.customers import Customers, Told
from devstack.processes import DevstackError, wait_until
from devstack.sightings import WATCH_EVERY, Sightings
from devstack.stack import Stack
from devstack.steps import Steps

CLIENTS = 16
HOT_SEATS = 5
CUSTOMERS_PER_HOT_SEAT = 50
FORGOTTEN_HOLD_S = 3
PROGRESS_INTERVAL_S = 0.2
# In a file a bar can't be drawn; there a line comes this often.
LINE_INTERVAL_S = 5.0
FILE_WIDTH = 100
CATCH_UP_TIMEOUT_S = 60.0
EXPIRY_TIMEOUT_S = 30.0

# As an analyst would ask; run with the analyst's role.
QUESTIONS: tuple[tuple[str, str], ...] = (
    (
        "Reservations by status, with what they are worth",
        """
SELECT status, count(*) AS reservations, sum(seat_count) AS seats,
       to_char(sum(amount) / 100.0, 'FM999,999,990.00') || ' ' || currency AS amount
FROM analytics.fct_reservations GROUP BY status, currency ORDER BY status, currency
""",
    ),
    (
        "The five best-selling performances",
        """
SELECT concert_id, performance_id, count(*) AS bookings, sum(seat_count) AS seats_sold,
       to_char(sum(amount) / 100.0, 'FM999,999,990.00') || ' ' || currency AS revenue
FROM analytics.fct_reservations WHERE status = 'confirmed'
GROUP BY concert_id, performance_id, currency ORDER BY seats_sold DESC LIMIT 5
""",
    ),
    (
        "How holds ended",
        """
SELECT coalesce(ended.event_type, 'still held') AS ended_by, count(*) AS holds,
       coalesce(round(extract(epoch FROM avg(ended.occurred_at - held.occurred_at))::numeric, 2)
           ::text, '') AS mean_seconds
FROM analytics.fct_reservation_events AS held
LEFT JOIN analytics.fct_reservation_events AS ended
    ON ended.reservation_id = held.reservation_id AND ended.version = 2
WHERE held.event_type = 'reservation.held' GROUP BY 1 ORDER BY 2 DESC
""",
    ),
)


def demo(steps: Steps, reservations: int) -> None:
    """Start everything, book, show what the analysts see, compare, stop everything.

    Raises:
        DevstackError: a part failed, or the places do not agree.
    """
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    with Stack(1, steps) as stack, Application(stack) as application:
        stack.start()
        with steps.step("service, relay and two workers"):
            application.seed()
            base_url = application.serve()
            impatient_url = application.serve(workers=1, hold_s=FORGOTTEN_HOLD_S)
            application.run_pipeline()
        environment = stack.environment
        with Sightings(environment["ANALYST_DATABASE_URL"]) as sightings:
            customers = Customers(
                base_url,
                impatient_url,
                secret_key=environment["RESERVATION_SECRET_KEY"],
                seats_by_performance=seats_on_sale(base_url),
                on_booked=sightings.booked,
            )
            with steps.step(f"{CUSTOMERS_PER_HOT_SEAT} customers at once want each of 5 seats"):
                _rush(customers)
            began_s = time.monotonic()
            with steps.step("bookings"):
                _book(customers, reservations, application, steps.console)
            elapsed_s = time.monotonic() - began_s
            late = _await_tables(customers.told, environment, sightings, steps)
        found = audit(as_they_ended(customers.told), environment)
        _show_tables(environment["ANALYST_DATABASE_URL"], console)
        _show_audit(found, console)
        _show_latency(customers.told, sightings.latencies_s, elapsed_s, console)
        application.check_alive()
    if differences := [*late, *found.differences()]:
        raise DevstackError("; ".join(differences))
    console.print("[green]Every place agrees: nothing lost, nothing doubled.[/]", highlight=False)


def seats_on_sale(base_url: str) -> dict[int, list[int]]:
    """Return performance → its seats, as the service's API tells them."""
    concerts: Any = get_json(f"{base_url}/api/concerts?limit=200")
    performance_ids = [
        performance["performance_id"]
        for concert in concerts["items"]
        for performance in concert["performances"]
    ]
    seats: dict[int, list[int]] = {}
    for performance_id in performance_ids:
        answer: Any = get_json(f"{base_url}/api/performances/{performance_id}/seats")
        seats[performance_id] = [seat["seat_id"] for seat in answer["seats"]]
    return seats


def _rush(customers: Customers) -> None:
    performance_id, seats = next(iter(customers.seats_by_performance.items()))
    for seat_id in seats[:HOT_SEATS]:
        winners = customers.rush(performance_id, seat_id, CUSTOMERS_PER_HOT_SEAT)
        if winners != 1:
            raise DevstackError(f"{winners} customers got seat {seat_id}; it should be one")


def _book(customers: Customers, wanted: int, application: Application, console: Console) -> None:
    failures: list[BaseException] = []

    def book() -> None:
        try:
            customers.book(wanted, CLIENTS)
        except Exception as error:  # noqa: BLE001 - raised below, in the main thread
            failures.append(error)

    booking = threading.Thread(target=book, daemon=True)
    booking.start()
    _follow(
        booking,
        lambda: len(customers.told.status_by_reservation),
        wanted,
        application=application,
        console=console,
    )
    if failures:
        raise DevstackError(f"a customer gave up: {failures[0]}")


def _follow(
    booking: threading.Thread,
    done: Callable[[], int],
    wanted: int,
    *,
    application: Application,
    console: Console,
) -> None:
    """Show the progress until the thread ends: a bar, or lines where no bar can be drawn."""
    said_s = time.monotonic()
    with Progress(
        TextColumn("  booking"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("booking", total=wanted)
        while booking.is_alive():
            booking.join(PROGRESS_INTERVAL_S)
            progress.update(task, completed=done())
            if not console.is_terminal and time.monotonic() - said_s > LINE_INTERVAL_S:
                said_s = time.monotonic()
                console.print(f"  … {done()} of {wanted} reservations", highlight=False)
            application.check_alive()


def _await_tables(
    told: Told, environment: dict[str, str], sightings: Sightings, steps: Steps
) -> list[str]:
    """Wait until forgotten holds have expired and every event is loaded; return what never came."""
    with (
        psycopg.connect(environment["RESERVATION_OWNER_DATABASE_URL"], autocommit=True) as service,
        psycopg.connect(environment["ANALYST_DATABASE_URL"], autocommit=True) as analyst,
    ):

        def expired() -> bool:
            statement = "SELECT count(*) FROM reservations WHERE status = 'expired'"
            return service.execute(statement).fetchone() == (len(told.forgotten),)

        def loaded() -> bool:
            wanted = service.execute("SELECT sum(version) FROM reservations").fetchone()
            facts = "SELECT count(*) FROM analytics.fct_reservation_events"
            return analyst.execute(facts).fetchone() == wanted and not sightings.waiting

        try:
            with steps.step("the analysts' tables hold every booking"):
                wait_until(expired, EXPIRY_TIMEOUT_S, "forgotten holds to expire")
                wait_until(loaded, CATCH_UP_TIMEOUT_S, "every event to be loaded")
        except TimeoutError as error:
            # What is missing where is told by the audit that follows.
            return [str(error)]
        return []


def as_they_ended(told: Told) -> dict[str, str]:
    """Return reservation → status, the forgotten holds' as expired."""
    return {
        reservation_id: "expired" if reservation_id in told.forgotten else status
        for reservation_id, status in told.status_by_reservation.items()
    }


def _show_tables(analyst_url: str, console: Console) -> None:
    with psycopg.connect(analyst_url) as connection:
        for title, statement in QUESTIONS:
            cursor = connection.execute(statement)
            table = Table(title=title, title_justify="left")
            for column in cursor.description or ():
                table.add_column(column.name)
            for row in cursor:
                table.add_row(*(str(value) for value in row))
            console.print(table)


def _show_audit(found: Audit, console: Console) -> None:
    table = Table(title="The same reservations in five places", title_justify="left")
    for name in ("place", "reservations", "events", *STATUSES):
        table.add_column(name, justify="left" if name == "place" else "right")
    for place, reservations, events, statuses in found.rows():
        counts = [str(statuses[status]) if statuses else "" for status in STATUSES]
        table.add_row(place, str(reservations), str(events or ""), *counts)
    console.print(table)
    if found.topic_records > len(found.topic):
        again = found.topic_records - len(found.topic)
        console.print(f"{again} records came twice in the topic (at least once); the tables don't.")


def _show_latency(
    told: Told, latencies_s: Sequence[float], elapsed_s: float, console: Console
) -> None:
    refused = told.answers[409]
    table = Table(title="How fast, all parts on this machine", title_justify="left")
    for name in ("", "count", "p50 ms", "p99 ms"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("booking answered", *_percentiles(told.booking_s))
    table.add_row("answer → visible to the analyst", *_percentiles(latencies_s))
    console.print(table)
    console.print(
        f"{len(told.status_by_reservation) / elapsed_s:.0f} reservations/s by {CLIENTS} clients;"
        f" {refused} times somebody else was quicker (409)."
        f" Every {WATCH_EVERY}th booking is watched on its way to the analyst.",
        highlight=False,
    )


def _percentiles(seconds: Sequence[float]) -> tuple[str, str, str]:
    cuts = statistics.quantiles(seconds, n=100)
    return str(len(seconds)), f"{cuts[49] * 1000:.1f}", f"{cuts[98] * 1000:.1f}"
