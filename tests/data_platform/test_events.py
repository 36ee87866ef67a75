"""A decoder gives a row or its own error, and judges as the published schema does."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from confluent_kafka import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from data_platform.batch import Slice, bad_record, decode, printable
from data_platform.events import NULL, BadRecordError, decode_reservation_event
from tests.data_platform.histories import event, history, moment

SCHEMA = json.loads(
    Path(__file__)
    .parents[2]
    .joinpath("contracts/reservation-event.schema.json")
    .read_text(encoding="utf-8")
)
validator = jsonschema.Draft202012Validator(SCHEMA)


def reason(key: bytes | None, value: bytes | None) -> str:
    """Why the record is bad."""
    with pytest.raises(BadRecordError) as caught:
        decode_reservation_event(key, value)
    return caught.value.reason


def changed(path: str, value: Any) -> bytes:
    """A good event's value with one field replaced; `path` like data.seats.0.price."""
    envelope = copy.deepcopy(dict(event("r-1").envelope))
    *parents, last = path.split(".")
    target: Any = envelope
    for name in parents:
        target = target[int(name) if name.isdigit() else name]
    target[last] = value
    return json.dumps(envelope).encode()


def without(path: str) -> bytes:
    """A good event's value without one field."""
    envelope = copy.deepcopy(dict(event("r-1").envelope))
    *parents, last = path.split(".")
    target: Any = envelope
    for name in parents:
        target = target[name]
    del target[last]
    return json.dumps(envelope).encode()


def test_every_event_of_a_reservations_life_is_a_row() -> None:
    for happened in history(50, seed=1):
        validator.validate(happened.envelope)
        row = decode_reservation_event(happened.key, happened.value)
        assert (row.reservation_id, row.version, row.type, row.occurred_at) == happened.fact[:4]
        columns = row.state.split("\t")
        assert columns[2:4] == list(happened.fact[4:6])
        assert [int(column) for column in columns[4:8]] == list(happened.fact[6:10])
        assert [moment(None if text == NULL else text) for text in columns[9:12]] == [
            happened.fact[11],
            happened.fact[3],
            happened.fact[12],
        ]


def test_fields_that_nobody_knows_yet_are_no_fault() -> None:
    envelope = {**event("r-1").envelope, "traceparent": "00-1-2-00", "partitionkey": 7}
    assert decode_reservation_event(b"r-1", json.dumps(envelope).encode()).version == 1


BAD_VALUES = [
    (None, "null-value"),
    (b"", "not-json"),
    (b"{", "not-json"),
    (b"\xef\xbb\xbf{}", "not-json"),
    (event("r-1").value + b"x", "not-json"),
    (b"[]", "schema"),
    (b"null", "schema"),
    (b"[" * 100_000, "schema"),
    (event("r-1").value[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too-deep"),
    (event("r-1").value.replace(b"Parterre", b"\xff\xfe"), "not-utf8"),
    (event("r-1").value[:-1] + b',"x":"\xc3"}', "not-utf8"),
    (event("r-1").value.replace(b"Parterre", rb"\ud800"), "not-json"),
    (event("r-1").value.replace(b"Parterre", rb"a\udc00b"), "not-json"),
    (event("r-1").value.replace(b"Parterre", rb"a\u0000b"), "nul"),
    (event("r-1").value.replace(b"Parterre", rb"\\\u0000"), "nul"),
    (changed("data.version", 2**31), "schema"),
    (changed("data.version", 0), "schema"),
    (changed("data.version", 1.0), "schema"),
    (changed("data.version", "1"), "schema"),
    (changed("data.version", True), "schema"),
    (changed("data.amount", 10**400), "schema"),
    (changed("data.amount", -1), "schema"),
    (changed("data.amount", 2**53), "schema"),
    (changed("data.performance.performance_id", 2**63), "schema"),
    (changed("data.currency", "eur"), "schema"),
    (changed("data.currency", "EUR\n"), "schema"),
    (changed("data.customer_id", "a b"), "schema"),
    (changed("data.customer_id", "c" * 65), "schema"),
    (changed("data.seats", []), "schema"),
    (changed("data.seats.0.section", ""), "schema"),
    (changed("data.seats.1.price", None), "schema"),
    (changed("data.created_at", "2027-02-30T00:00:00Z"), "schema"),
    (changed("data.created_at", "2027-02-03 00:00:00Z"), "schema"),
    (changed("time", "2027-01-01T10:00:00+00:00"), "schema"),
    (changed("time", 1), "schema"),
    (changed("type", "reservation.lost"), "unknown-type"),
    (changed("type", "concert.published"), "unknown-type"),
    (changed("type", 7), "schema"),
    (changed("type", "reservation.completed"), "schema"),
    (changed("specversion", "0.3"), "schema"),
    (changed("specversion", "1.1"), "unknown-schema"),
    (changed("specversion", 2.0), "schema"),
    (
        changed("dataschema", "urn:concert-reservation:schema:reservation-event:2"),
        "unknown-schema",
    ),
    (changed("dataschema", "urn:concert-reservation:schema:reservation-event:0"), "schema"),
    (changed("dataschema", "urn:elsewhere:2"), "schema"),
    (changed("source", "/elsewhere"), "schema"),
    (without("time"), "schema"),
    (without("data.expires_at"), "schema"),
    (changed("subject", "r-2"), "subject"),
    (changed("id", "r-1:2"), "id"),
    (changed("id", "r-1"), "id"),
]


@pytest.mark.parametrize(("value", "expected"), BAD_VALUES)
def test_a_record_that_breaks_the_contract_says_how(value: bytes | None, expected: str) -> None:
    assert reason(b"r-1", value) == expected


@pytest.mark.parametrize("key", [None, b"", b"r-2", b"r-1\0", b"R-1"])
def test_a_key_other_than_the_reservation_is_a_bad_record(key: bytes | None) -> None:
    assert reason(key, event("r-1").value) == "key"


def test_a_text_about_an_escaped_nul_is_no_nul() -> None:
    value = event("r-1").value.replace(b"Parterre", rb"\\u0000")
    assert decode_reservation_event(b"r-1", value).seats[0].section == "\\u0000"


def test_a_time_finer_than_a_microsecond_is_a_time() -> None:
    exact = changed("time", "2027-01-01T10:00:00.123456789Z")
    assert decode_reservation_event(b"r-1", exact).occurred_at.microsecond == 123456


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["held", "confirmed", "2027-01-01T00:00:00Z", "EUR", "r-1", "\0", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Each place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        path
        for name, child in inner
        for path in [(*here, name), *(paths(child, (*here, name)) if _holds(child) else [])]
    ]


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


TEMPLATE = json.loads(event("r-1").value)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(paths(TEMPLATE)), value=json_values, remove=st.booleans())
def test_a_mutated_event_is_judged_as_the_schema_judges_it(
    path: tuple[Any, ...], value: Any, *, remove: bool
) -> None:
    envelope = copy.deepcopy(TEMPLATE)
    target = envelope
    for name in path[:-1]:
        target = target[name]
    if remove:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    raw = json.dumps(envelope).encode()
    try:
        decode_reservation_event(b"r-1", raw)
        good = True
    except BadRecordError:
        good = False
    if good:
        validator.validate(envelope)
    # Stricter than the schema alone: key, subject and id belong together, times exist, integers
    # are written as such, no U+0000 and no lone surrogate anywhere.
    elif path[-1] not in {"id", "subject", "reservation_id", "version", "time"} and _storable(
        value
    ):
        assert not validator.is_valid(envelope)


def _storable(value: Any) -> bool:
    text = json.dumps(value)
    return not (
        "\\u0000" in text
        or "\\ud" in text
        or "Z" in text
        or (isinstance(value, float) and value.is_integer())
        or text.count("[") + text.count("{") > 0
    )


@settings(max_examples=300, deadline=None)
@given(
    key=st.none() | st.binary(max_size=10) | st.just(b"r-1"),
    cut=st.integers(0, 700),
    junk=st.binary(max_size=6),
    keep_rest=st.booleans(),
)
def test_no_bytes_make_the_decoder_raise_anything_but_its_own_error(
    key: bytes | None, cut: int, junk: bytes, *, keep_rest: bool
) -> None:
    good = event("r-1").value
    raw = good[:cut] + junk + (good[cut + len(junk) :] if keep_rest else b"")
    message = Message(topic="t", partition=0, offset=1, key=key, value=raw)
    decoded = decode([Slice("t", 0, "id", 1, 2, [message])], {"t": decode_reservation_event})
    assert len(decoded.rows) + len(decoded.bad) == 1
    for bad in decoded.bad:
        assert "\0" not in bad.error
        bad.error.encode("utf-8")


def test_headers_are_kept_in_order_with_null_and_empty_apart() -> None:
    message = Message(topic="t", headers=[("a", b"\x00\xff"), ("b", None), ("a", b""), ("é", b"x")])
    headers = bad_record(message, "x", ValueError("x")).headers
    assert headers == [["a", "AP8="], ["b", None], ["a", ""], ["é", "eA=="]]


def test_an_error_text_can_always_be_stored() -> None:
    assert printable("a\0b\ud800" + "c" * 5000) == "a\\x00b\\ud800" + "c" * (1000 - 12)
