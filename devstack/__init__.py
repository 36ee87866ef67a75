"""A local stack of real parts: PostgreSQL and Apache Kafka, with or without Docker.

Not in the wheel: the demo, the tests and the benchmarks stand on it. Whatever it starts dies
with the process that started it, however that one ends.
"""
