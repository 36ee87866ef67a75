"""Reservation service."""
