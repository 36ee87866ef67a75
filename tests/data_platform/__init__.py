"""Tests of the data platform."""
