"""Waiting in tests: for a condition, with a bound. No test sleeps."""

from devstack.processes import wait_until

__all__ = ["wait_until"]
