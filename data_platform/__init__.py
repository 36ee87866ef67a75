"""Data platform."""
