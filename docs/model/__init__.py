"""A small exhaustive model of the two places where an order of steps could lose an event.

`relay.py`: reading the outbox by snapshot difference. `loader.py`: moving the offsets. Each comes
with the wrong ways that are usual, which must break. `make model` runs all; see README.md.
"""
