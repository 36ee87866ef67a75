"""Events gone wrong in every way we could think of, the same ones for the same seed.

Some mutants are still good: the oracle tells, not we.
"""

import base64
import copy
import json
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Envelope = dict[str, Any]
Headers = list[tuple[str, bytes | None]]

LARGEST_BYTES = 900_000
# A few large ones are enough, and more would not fit into a test's time.
LARGE_SHARE = 0.004

NUMBERS = [
    0, -1, 1, 2, 2**31 - 1, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400,
    1.0, 1.5, -0.0, 1e3, 1e300, True,
]  # fmt: skip
TEXTS = [
    "", " ", "a", "a" * 64, "a" * 65, "a" * 200, "a" * 201, "é" * 200, "\U0001f3bb" * 200,
    "\U0001f3bb" * 201, "\0", "a\0b", "\\u0000", "\\\0", "\ud800", "a\udc00b", "\u2028\u2029",
    "\ufeff", "\uffff", "\u202eabc", "\t\n\r\b\f", "\\N", "\\.", "\\", '"', "'; DROP TABLE x; --",
    "%s %(x)s {0}", "NaN", "null", "EUR", "eur", "EUR\n", "held", "expired", "1", "1.0", "a b",
    "..", "-", "_", "reservation.held", "Europe/Berlin", "\x7f\x80", "e\u0301",
]  # fmt: skip
TIMES = [
    "2027-02-28T23:59:59Z", "2027-02-29T00:00:00Z", "2028-02-29T00:00:00Z", "2027-02-30T00:00:00Z",
    "2027-13-01T00:00:00Z", "2027-00-01T00:00:00Z", "2027-01-32T00:00:00Z", "2027-01-01T24:00:00Z",
    "2027-01-01T23:60:00Z", "2027-01-01T23:59:60Z", "2027-01-01T00:00:00.1Z",
    "2027-01-01T00:00:00.123456Z", "2027-01-01T00:00:00.1234567Z",
    "2027-01-01T00:00:00.999999999Z", "2027-01-01T00:00:00.123456789012345678Z",
    "2027-01-01T00:00:00.1234567890123456789Z", "2027-01-01T00:00:00.Z", "2027-01-01T00:00:00,5Z",
    "2027-01-01T00:00:00+00:00", "2027-01-01T00:00:00-00:00", "2027-01-01T00:00:00",
    "2027-01-01t00:00:00z", "2027-01-01 00:00:00Z", "2027-01-01", "20270101T000000Z",
    "0000-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "9999-12-31T23:59:59Z",
    "10000-01-01T00:00:00Z", "-0001-01-01T00:00:00Z", "infinity", "now", "epoch",
    "2027-01-01T00:00:00Z\n", "\u0662027-01-01T00:00:00Z", "2027-W01-1T00:00:00Z",
]  # fmt: skip
TYPES = [
    "reservation.held", "reservation.extended", "reservation.completed", "reservation.cancelled",
    "reservation.expired", "reservation.moved", "concert.published", "concert.changed", "",
    "RESERVATION.HELD",
]  # fmt: skip
SCHEMAS = [
    "urn:concert-reservation:schema:reservation-event:1",
    "urn:concert-reservation:schema:reservation-event:2",
    "urn:concert-reservation:schema:concert-event:1",
    "urn:concert-reservation:schema:concert-event:2",
    "https://example.org/schema",
    "",
]
KINDS: dict[str, list[Any]] = {
    "type": TYPES,
    "dataschema": SCHEMAS,
    "specversion": ["1.0", "1.1", "2.0", "0.3", 1.0],
    "source": ["/reservation-service", "/elsewhere", "reservation-service"],
    "datacontenttype": ["application/json", "application/xml", "application/json "],
    "traceparent": ["00-1-2-00", "", None, 7],
}
VERSIONS = [1, 2, 7, 2**31 - 1, 2**31, 0, -1, 10**12]
JUNK: list[Any] = [None, [], {}, [[]], {"": None}, [1, "a", None], {"a": {"b": [0.5]}}]
HEADERS: list[Headers] = [
    [],
    [("content-type", b"application/cloudevents+json")],
    [("traceparent", b"00-1-2-00"), ("a", b""), ("a", None), ("", b"x")],
    [("bin\u00e4r", bytes(range(256)))],
    [("a", b"\0"), ("\t\u2028", b"\xff\xfe")],
]


class Record(NamedTuple):
    """What is put into the topic."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def records(
    envelopes: Iterable[Envelope], seed: int, *, is_catalogue: bool = False
) -> Iterator[Record]:
    """Yield a record an envelope; about one in three as it is, the others mutated once or twice."""
    dice = random.Random(seed)  # noqa: S311 - the same mutants each time
    name = "concert_id" if is_catalogue else "reservation_id"
    for original in envelopes:
        envelope = copy.deepcopy(original)
        key: bytes | None = str(envelope["subject"]).encode()
        way = dice.random()
        value: bytes | None
        if way < LARGE_SHARE:
            value = _large(envelope, dice)
        elif way < 0.65:
            for _ in range(dice.choice([1, 1, 1, 2])):
                key = dice.choice(ENVELOPE_MUTATIONS)(envelope, name, key, dice)
            value = _written(envelope, dice)
            if way < 0.15:
                value = dice.choice(BYTES_MUTATIONS)(value, dice)
            if way < 0.03:
                key = dice.choice([None, b"", b"\0", (key or b"") + b"\0", (key or b"").upper()])
        else:
            value = _written(envelope, dice)
        yield Record(key, value, dice.choice(HEADERS))


def _written(envelope: Envelope, dice: random.Random) -> bytes:
    style: dict[str, Any] = dice.choice(
        [
            {"ensure_ascii": False, "separators": (",", ":")},
            {"ensure_ascii": False},
            {"ensure_ascii": True},
            {"indent": 1, "sort_keys": True},
        ]
    )
    return json.dumps(envelope, **style).encode("utf-8", "surrogatepass")


def _large(envelope: Envelope, dice: random.Random) -> bytes:
    left_bytes = dice.randrange(50_000, LARGEST_BYTES) - len(_compact(envelope))
    padding = base64.b64encode(dice.randbytes(left_bytes * 3 // 4 - 3)).decode()
    way = dice.randrange(6)
    data = envelope["data"]
    if way == 0:
        envelope["padding"] = padding
    elif way == 1:
        data["padding"] = [padding[at : at + 1000] for at in range(0, len(padding), 1010)]
    elif way == 2:
        envelope["source"] = padding
    elif way == 3 and "seats" in data:
        data["seats"] = [
            {"seat_id": n, "section": "Rang", "row": "1", "number": n, "price": n}
            for n in range(1, left_bytes // 80)
        ]
    elif way == 4:
        deep = b"[" * (left_bytes // 2) + b"]" * (left_bytes // 2)
        return _compact(envelope)[:-1] + b',"deep":' + deep + b"}"
    else:
        return dice.randbytes(left_bytes)
    return _compact(envelope)


def _compact(envelope: Envelope) -> bytes:
    return json.dumps(envelope, separators=(",", ":")).encode()


# ---- what an envelope may become; each returns the record's key

Mutation = Callable[[Envelope, str, "bytes | None", random.Random], "bytes | None"]


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: Iterable[tuple[Any, Any]] = (
        value.items() if isinstance(value, dict) else enumerate(value)
    )
    return [
        place
        for name, child in inner
        for place in [
            (*here, name),
            *(_places(child, (*here, name)) if isinstance(child, dict | list) else []),
        ]
    ]


def _holder(envelope: Envelope, place: Sequence[Any]) -> Any:
    target: Any = envelope
    for name in place[:-1]:
        target = target[name]
    return target


def _any_value(dice: random.Random) -> Any:
    kinds: list[list[Any]] = [NUMBERS, TEXTS, TIMES, JUNK]
    # A copy: the next mutation may change it.
    return copy.deepcopy(dice.choice(dice.choice(kinds)))


def _replace(
    envelope: Envelope, _name: str, key: bytes | None, dice: random.Random
) -> bytes | None:
    place = dice.choice(_places(envelope))
    _holder(envelope, place)[place[-1]] = _any_value(dice)
    return key


def _replace_by_its_like(
    envelope: Envelope, _name: str, key: bytes | None, dice: random.Random
) -> bytes | None:
    place = dice.choice(_places(envelope))
    holder = _holder(envelope, place)
    old = holder[place[-1]]
    if isinstance(old, str):
        holder[place[-1]] = dice.choice(TIMES if old[-1:] == "Z" else TEXTS)
    elif isinstance(old, int):
        holder[place[-1]] = dice.choice(NUMBERS)
    return key


def _remove(envelope: Envelope, _name: str, key: bytes | None, dice: random.Random) -> bytes | None:
    place = dice.choice(_places(envelope))
    del _holder(envelope, place)[place[-1]]
    return key


def _add(envelope: Envelope, _name: str, key: bytes | None, dice: random.Random) -> bytes | None:
    objects = [envelope, *(_at(envelope, place) for place in _places(envelope))]
    dice.choice([one for one in objects if isinstance(one, dict)])[dice.choice(TEXTS)] = _any_value(
        dice
    )
    return key


def _at(envelope: Envelope, place: Sequence[Any]) -> Any:
    return _holder(envelope, place)[place[-1]]


def _retype(envelope: Envelope, _name: str, key: bytes | None, dice: random.Random) -> bytes | None:
    place = dice.choice(_places(envelope))
    holder = _holder(envelope, place)
    old = holder[place[-1]]
    holder[place[-1]] = dice.choice([str(old), [old], bool(old), json.dumps(old)])
    return key


def _rekind(envelope: Envelope, _name: str, key: bytes | None, dice: random.Random) -> bytes | None:
    field = dice.choice(list(KINDS))
    envelope[field] = dice.choice(KINDS[field])
    return key


def _rename(envelope: Envelope, name: str, key: bytes | None, dice: random.Random) -> bytes | None:
    """Another subject, in all places or all but one."""
    if not isinstance(envelope.get("data"), dict):
        return key
    subject: Any = (
        dice.choice([dice.randrange(2**40), 2**63 - 1, 2**63, 0, -5, 7.5])
        if name == "concert_id"
        else dice.choice([str(uuid.UUID(int=dice.getrandbits(128))), *TEXTS])
    )
    text = str(subject)
    spared = dice.randrange(8)
    if spared != 0:
        envelope["data"][name] = subject
    if spared != 1:
        envelope["subject"] = text
    if spared != 2:
        envelope["id"] = f"{text}:{envelope['data'].get('version')}"
    return key if spared == 3 else text.encode("utf-8", "surrogatepass")


def _reversion(
    envelope: Envelope, _name: str, key: bytes | None, dice: random.Random
) -> bytes | None:
    if isinstance(envelope.get("data"), dict):
        version = dice.choice(VERSIONS)
        envelope["data"]["version"] = version
        if dice.random() < 0.8:
            envelope["id"] = f"{envelope.get('subject')}:{version}"
    return key


ENVELOPE_MUTATIONS: Sequence[Mutation] = (
    _replace, _replace_by_its_like, _replace_by_its_like, _remove, _add, _retype, _rekind,
    _rename, _reversion,
)  # fmt: skip


# ---- what bytes may become


def _cut(value: bytes, dice: random.Random) -> bytes:
    return value[: dice.randrange(len(value))]


def _flip(value: bytes, dice: random.Random) -> bytes:
    changed = bytearray(value)
    for _ in range(dice.choice([1, 1, 2, 8])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _insert(value: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(value) + 1)
    return value[:at] + dice.randbytes(dice.randrange(1, 8)) + value[at:]


def _leave_out(value: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(value))
    return value[:at] + value[at + dice.randrange(1, 30) :]


def _repeat(value: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(value))
    return value[: at + dice.randrange(1, 30)] + value[at:]


def _wrap(value: bytes, dice: random.Random) -> bytes:
    before, after = dice.choice(
        [
            (b" \t\r\n", b"\n"), (b"\xef\xbb\xbf", b""), (b"", b"\0"), (b"[", b"]"), (b"", b"x"),
            (b"\x0c", b""), (b"", b" {}"), (b"\0\0\0\0\x01", b""),
        ]
    )  # fmt: skip
    return before + value + after


def _encode(value: bytes, dice: random.Random) -> bytes:
    encoding = dice.choice(["utf-16", "utf-32-le", "latin-1", "cp037"])
    return value.decode("utf-8", "replace").encode(encoding, "replace")


def _other(_value: bytes, dice: random.Random) -> bytes | None:
    return dice.choice(
        [
            None, b"", b" ", b"{}", b"[]", b"null", b"NaN", b'"', b"0", b"\0", b"\xff" * 9,
            b'{"a":1e999}', b"[" * 100_000, b'{"type":' * 10_000, b"-", b"1" * 5_000,
            b'{"data":{},"data":{}}', dice.randbytes(300),
        ]
    )  # fmt: skip


BYTES_MUTATIONS: Sequence[Callable[[bytes, random.Random], bytes | None]] = (
    _cut, _flip, _flip, _insert, _leave_out, _repeat, _wrap, _encode, _other,
)  # fmt: skip
