"""Records that confluent_kafka doesn't let one produce: header names that aren't UTF-8."""

import ctypes
from pathlib import Path

import confluent_kafka

FLUSH_TIMEOUT_MS = 30_000
# rdkafka.h
PRODUCER = 0
TOPIC, PARTITION, VALUE, KEY, MESSAGE_FLAGS, HEADER = 1, 3, 4, 5, 7, 9
COPY = 2


class _Header(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p), ("size", ctypes.c_ssize_t))


class _Memory(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Content(ctypes.Union):
    _fields_ = (
        ("text", ctypes.c_char_p),
        ("number", ctypes.c_int),
        ("memory", _Memory),
        ("header", _Header),
        ("padding", ctypes.c_char * 64),
    )


class _Argument(ctypes.Structure):
    """rd_kafka_vu_t"""

    _fields_ = (("kind", ctypes.c_int), ("content", _Content))


def produce_with_header(
    bootstrap_servers: str, topic: str, key: bytes, value: bytes, header_name: bytes
) -> None:
    """Put a record into partition 0, with one header of value b"h"."""
    library = _librdkafka()
    problem = ctypes.create_string_buffer(512)
    settings = library.rd_kafka_conf_new()
    assert not library.rd_kafka_conf_set(
        settings, b"bootstrap.servers", bootstrap_servers.encode(), problem, len(problem)
    )
    client = library.rd_kafka_new(PRODUCER, settings, problem, len(problem))
    assert client, problem.value
    arguments = (_Argument * 6)(
        _Argument(TOPIC, _Content(text=topic.encode())),
        _Argument(PARTITION, _Content(number=0)),
        _Argument(MESSAGE_FLAGS, _Content(number=COPY)),
        _Argument(KEY, _Content(memory=_Memory(key, len(key)))),
        _Argument(VALUE, _Content(memory=_Memory(value, len(value)))),
        _Argument(HEADER, _Content(header=_Header(header_name, b"h", 1))),
    )
    assert not library.rd_kafka_produceva(client, arguments, len(arguments))
    assert library.rd_kafka_flush(client, FLUSH_TIMEOUT_MS) == 0
    library.rd_kafka_destroy(client)


def _librdkafka() -> ctypes.CDLL:
    """The one that confluent_kafka brings along."""
    folder = Path(confluent_kafka.__file__).parent.with_name("confluent_kafka.libs")
    library = ctypes.CDLL(str(next(folder.glob("librdkafka-*"))))
    pointer = ctypes.c_void_p
    for name, result, *arguments in (
        ("rd_kafka_conf_new", pointer),
        ("rd_kafka_new", pointer, ctypes.c_int, pointer, ctypes.c_char_p, ctypes.c_size_t),
        ("rd_kafka_produceva", pointer, pointer, pointer, ctypes.c_size_t),
        ("rd_kafka_flush", ctypes.c_int, pointer, ctypes.c_int),
        ("rd_kafka_destroy", None, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.rd_kafka_conf_set.argtypes = [
        pointer,
        *(ctypes.c_char_p,) * 3,
        ctypes.c_size_t,
    ]
    return library
