"""import-concert: what organisers' files may look like, and that a file makes one concert."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reservation_service import concert_import
from reservation_service.new_concert import NewConcert
from tests.reservation_service.house import House
from tests.reservation_service.test_outbox import TRACEPARENT

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
CSV = EXAMPLES / "concert.csv"
TIMEOUT_S = 60
MEMORY_MAX_KB = 300_000

Import = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def import_concert(house: House) -> Import:
    def run(file: Path, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "reservation_service", "import-concert", str(file), *options],
            env=os.environ | house.environment | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    return run


def concerts(house: House) -> int:
    return int(house.execute("SELECT count(*) AS n FROM concerts")[0]["n"])


def refusal(tmp_path: Path, text: str, name: str = "plan.csv") -> str:
    """What is said of a file with this content, in one line."""
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(concert_import.FileError) as refused:
        concert_import.read(file)
    (line,) = str(refused.value).splitlines()
    return line


def test_the_examples_are_imported_as_the_same_concert_and_only_once(
    house: House, import_concert: Import
) -> None:
    before = concerts(house)
    first = import_concert(CSV, TRACEPARENT=TRACEPARENT)
    assert (first.returncode, first.stderr) == (0, "")
    assert "published: An Evening with Bach, 45.50 to 89.00 EUR" in first.stdout
    again = [import_concert(CSV), import_concert(EXAMPLES / "concert.json")]
    for done in again:
        assert (done.returncode, done.stderr) == (0, "")
        assert "is there already; nothing was changed" in done.stdout
    assert concerts(house) == before + 1
    rows = house.execute("SELECT * FROM outbox WHERE topic = 'concert-catalogue' ORDER BY id")
    assert len(rows) == before + 1
    assert rows[-1]["headers"]["traceparent"] == TRACEPARENT
    performances = rows[-1]["payload"]["data"]["performances"]
    assert [one["capacity"] for one in performances] == [78, 78]
    assert performances[0]["sections"] == [
        {"section": "Stalls", "capacity": 58, "blocked": 0, "price_min": 7500, "price_max": 8900},
        {"section": "Balcony", "capacity": 20, "blocked": 0, "price_min": 4550, "price_max": 4550},
    ]
    seats = house.execute(
        'SELECT section, "row", number, price FROM seats WHERE performance_id = %s'
        " ORDER BY seat_id",
        performances[0]["performance_id"],
    )
    assert [seat["number"] for seat in seats[:18]] == [*range(1, 10), *range(11, 20)]
    assert seats[-1] == {"section": "Balcony", "row": "1", "number": 24, "price": 4550}


def test_a_file_that_was_edited_is_not_taken_for_another_concert(
    house: House, import_concert: Import, tmp_path: Path
) -> None:
    assert import_concert(CSV).returncode == 0
    known = concerts(house)
    edited = tmp_path / "edited.csv"
    edited.write_text(CSV.read_text("utf-8").replace("89.00", "90.00"), encoding="utf-8")
    done = import_concert(edited)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "this venue and one of these starts" in line
    assert concerts(house) == known


def test_two_imports_at_once_make_one_concert(house: House) -> None:
    concert = concert_import.read(CSV)

    def publish(_: int) -> concert_import.Imported:
        with house.connect() as connection:
            return concert_import.publish_once(connection, concert)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(publish, range(4)))
    assert sorted(one.known for one in done) == [False, True, True, True]
    assert len({one.concert_id for one in done}) == 1
    assert concerts(house) == 2


# Not the usage that the kernel tells of an ended child: that begins with the size of its parent.
TELLING_ITS_PEAK = """
import atexit, re, sys
from reservation_service.__main__ import main
status = lambda: open("/proc/self/status").read()
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", status())[1], file=sys.stderr))
main()
"""


def test_a_hundred_thousand_seats_take_bounded_memory(house: House, tmp_path: Path) -> None:
    head = CSV.read_text("utf-8").partition("performance,2027-05-02")[0]
    seats = "".join(f"S{n // 5_000},R{n // 50 % 100},{n % 50 * 2 + 1},90\n" for n in range(100_000))
    file = tmp_path / "big.csv"
    file.write_text(f"{head}section,row,number,price\n{seats}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", TELLING_ITS_PEAK, "import-concert", str(file)],
        env=os.environ | house.environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert int(done.stderr.split()[-1]) < MEMORY_MAX_KB
    assert house.execute("SELECT count(*) AS n FROM seats")[0]["n"] == 100_020
    assert house.events("concert-catalogue")[-1]["data"]["performances"][0]["capacity"] == 100_000


def test_a_concert_whose_event_its_topic_does_not_take_is_refused_whole(
    house: House, import_concert: Import
) -> None:
    house.execute("UPDATE outbox_topics SET max_bytes = 1000 WHERE topic = 'concert-catalogue'")
    done = import_concert(CSV)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert 'topic "concert-catalogue" takes 1000' in line
    assert concerts(house) == 1


def test_the_largest_concert_that_is_allowed_has_an_event_that_fits(house: House) -> None:
    name = "\\" * 60  # twice as long in JSON
    section = {"section": "", "price": 10**12, "rows": [{"row": "1", "seats": 1}]}
    sections = [section | {"section": f"{n:02}{name[2:]}"} for n in range(50)]
    evening = json.loads((EXAMPLES / "concert.json").read_text("utf-8"))["performances"][0]
    concert = NewConcert.model_validate_json(
        json.dumps(
            {
                "title": "\\" * 200,
                "venue": "서" * 200,
                "time_zone": "Europe/Berlin",
                "currency": "EUR",
                "performances": [evening | {"sections": sections}] * 20,
            }
        )
    )
    with house.connect() as connection:
        concert_import.publish_once(connection, concert)
    assert len(house.events("concert-catalogue")[-1]["data"]["performances"]) == 20


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("title,", "titel,", "plan.csv:1: expected title, venue, time_zone, currency, performance"),
        ("venue,", "title,", "plan.csv:2: title: is told twice"),
        ('"Town Hall, Leipzig"', "Town Hall, Leipzig", "plan.csv:2: venue: expected one value"),
        ("Europe/Berlin", "Berlin", "plan.csv:3: time_zone: expected an IANA time zone"),
        ("currency,EUR\n", "", "plan.csv:7: currency: is missing above this line"),
        ("currency,EUR", "currency,euro", "plan.csv:4: currency: "),
        ("2027-05-01 19:30", "1 May 2027", "plan.csv:5: starts_at: expected a time like"),
        ("2027-05-01 19:30", "2027-02-30 19:30", "plan.csv:5: starts_at: expected a time like"),
        ("2027-01-10 10:00", "2027-03-28 02:30", "plan.csv:5: sales_open_at: clocks in Europe"),
        ("2027-01-10 10:00", "2026-10-25 02:30", "plan.csv:5: sales_open_at: clocks in Europe"),
        ("2027-01-10 10:00", "2027-06-10 10:00", "plan.csv:5: sales_close_at: expected a time aft"),
        (",2027-05-01 18:30", "", "plan.csv:5: performance: expected starts_at, sales_open_at"),
        ("section,row,seats,price", "section,row,seat", "plan.csv:8: expected title, venue"),
        ("Stalls,B,20,89.00", "Stalls,B,20", "plan.csv:10: expected 4 values, found 3"),
        ("Stalls,B,20,89.00", "Stalls,B,20,89,00", "plan.csv:10: expected 4 values, found 5"),
        ("Stalls,B,20,89.00", "Stalls,B,20,89.005", "plan.csv:10: price: expected a price in EUR"),
        ("Stalls,B,20,89.00", "Stalls,B,20,-1", "plan.csv:10: price: expected a price in EUR"),
        ("Stalls,B,20", "Stalls,B,many", "plan.csv:10: seats: expected 20, 5-24 or 1-9 11-19"),
        ("Stalls,B,20", "Stalls,B,20-1", "plan.csv:10: seats: expected 20, 5-24 or 1-9 11-19"),
        ("Stalls,B,20", "Stalls,B,0", "plan.csv:10: seats: expected 20, 5-24 or 1-9 11-19"),
        ("Stalls,B,20", "Stalls,,20", "plan.csv:10: row: String should have at least 1 character"),
        ("Stalls,B,20", f"{'S' * 61},B,20", "plan.csv:10: section: String should have at most 60"),
        ("Stalls,B,20", "Stalls,A,15", "plan.csv:10: section 'Stalls', row 'A' has seat 1 twice"),
        ("Stalls,B,20", "Stalls,B,60000", "plan.csv:10: expected at most 100000 seats in all"),
        ("Stalls,B,20", 'Stalls,"B,20', "plan.csv:12: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_told_by_its_line(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = CSV.read_text("utf-8")
    assert before in text
    assert said in refusal(tmp_path, text.replace(before, after, 1))


def test_an_empty_or_unfinished_file_says_what_is_expected(tmp_path: Path) -> None:
    text = CSV.read_text("utf-8")
    assert "expected the line section,row,seats,price" in refusal(tmp_path, "")
    head = text.partition("Stalls")[0]
    assert "expected seats below this line" in refusal(tmp_path, head)
    assert "expected at most 16777216 bytes" in refusal(tmp_path, " " * 2**24 + " ")
    (tmp_path / "latin.csv").write_bytes(text.replace("Bach", "Händel").encode("latin-1"))
    with pytest.raises(concert_import.FileError, match=r"latin\.csv:1: expected UTF-8"):
        concert_import.read(tmp_path / "latin.csv")


def test_json_that_is_wrong_is_told_by_its_member(tmp_path: Path) -> None:
    text = (EXAMPLES / "concert.json").read_text("utf-8")
    wrong = text.replace('"seats": 20', '"seats": "20"', 1)
    where = "performances.0.sections.0.rows.2.seats: Input should be a valid integer"
    assert refusal(tmp_path, wrong, "plan.json") == f"plan.json: {where}"
    assert "line 6 column 3" in refusal(tmp_path, text.replace('"EUR",', '"EUR"'), "plan.json")


def test_a_spreadsheet_s_own_separators_marks_and_empty_cells_are_read(tmp_path: Path) -> None:
    text = CSV.read_text("utf-8")
    plain = concert_import.read(CSV)
    written = text.replace('"Town Hall, Leipzig"', "Town Hall @ Leipzig").replace(",", ";")
    written = written.replace("@", ",").replace(" ,", ",").replace("\n\n", "\n;;;\n")
    file = tmp_path / "excel.csv"
    file.write_bytes(b"\xef\xbb\xbf" + written.replace("\n", ";\r\n").encode())
    read = concert_import.read(file)
    assert concert_import.fingerprint(read) == concert_import.fingerprint(plain)


def test_prices_have_as_many_decimals_as_their_currency(tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    head = CSV.read_text("utf-8").partition("Stalls")[0]
    for currency, price, minor in (("KRW", "90000", 90_000), ("KWD", "1.5", 1_500)):
        file.write_text(f"{head.replace('EUR', currency)}Stalls,A,1,{price}\n", encoding="utf-8")
        (section,) = concert_import.read(file).performances[0].sections
        assert section.price == minor
    assert "like 8950" in refusal(tmp_path, f"{head.replace('EUR', 'KRW')}Stalls,A,1,90.50\n")


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_read_is_wrong_usage(
    import_concert: Import, tmp_path: Path, name: str
) -> None:
    done = import_concert(tmp_path / name)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_check_writes_nothing_and_needs_no_database(import_concert: Import, house: House) -> None:
    done = import_concert(CSV, "--check", RESERVATION_DATABASE_URL="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "An Evening with Bach" in done.stdout
    assert concerts(house) == 1
