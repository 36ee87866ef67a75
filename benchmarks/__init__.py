"""How fast the relay is, beside what else there is: each figure as a ratio within one run.

Every contender publishes the same rows, events as the service writes them, from the same Postgres
into the same Kafka with acks=all and lz4, alone on the machine and warm. Whatever it publishes is
read back and counted: a run in which an event was lost, doubled or out of order has failed.
"""
