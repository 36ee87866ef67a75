"""Outbox relay."""
