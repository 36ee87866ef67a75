"""Migrated databases for tests, with the connection URL of each role."""

from dataclasses import dataclass

import migrations
from devstack.postgres import PostgresServer


@dataclass(frozen=True)
class ReservationDatabase:
    """The reservations database of one test."""

    name: str
    owner_url: str
    service_url: str
    relay_url: str


@dataclass(frozen=True)
class AnalyticsDatabase:
    """The analysts' database of one test."""

    name: str
    owner_url: str
    loader_url: str
    analyst_url: str


def create_reservation_database(
    server: PostgresServer, name: str = "reservations"
) -> ReservationDatabase:
    """Create and migrate a database on a server, with new passwords for its roles."""
    owner, service, relay = "reservation_owner", "reservation_service", "outbox_relay"
    server.create_database(name, owner)
    owner_url = server.url(name, owner, server.give_password(owner))
    migrations.upgrade("reservations", owner_url)
    return ReservationDatabase(
        name,
        owner_url,
        server.url(name, service, server.give_password(service)),
        server.url(name, relay, server.give_password(relay)),
    )


def create_analytics_database(server: PostgresServer, name: str = "analytics") -> AnalyticsDatabase:
    """Create and migrate a database on a server, with new passwords for its roles."""
    owner, loader, analyst = "analytics_owner", "data_platform", "analyst"
    server.create_database(name, owner)
    owner_url = server.url(name, owner, server.give_password(owner))
    migrations.upgrade("analytics", owner_url)
    return AnalyticsDatabase(
        name,
        owner_url,
        server.url(name, loader, server.give_password(loader)),
        server.url(name, analyst, server.give_password(analyst)),
    )
