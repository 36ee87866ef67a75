"""Invented events of topic `concert-catalogue`."""

import json
from typing import Any


def concert_event(
    concert_id: int = 1, version: int = 1, performances: int = 2, **data: Any
) -> dict[str, Any]:
    """One valid event; its performances are 10 * concert_id + 0, 1, …; `data` replaces fields."""
    return {
        "specversion": "1.0",
        "id": f"{concert_id}:{version}",
        "source": "/reservation-service",
        "type": "concert.published" if version == 1 else "concert.changed",
        "subject": str(concert_id),
        "time": f"2027-01-01T09:00:{version:02}Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:concert-reservation:schema:concert-event:1",
        "data": {
            "concert_id": concert_id,
            "version": version,
            "title": "Nacht der Streicher — Ø",
            "venue": "Philharmonic Hall",
            "time_zone": "Europe/Berlin",
            "currency": "EUR",
            "performances": [
                {
                    "performance_id": 10 * concert_id + number,
                    "starts_at": f"2027-05-0{1 + number}T18:00:00Z",
                    "sales_open_at": "2027-01-01T10:00:00Z",
                    "sales_close_at": "2027-05-01T17:00:00Z",
                    "status": "scheduled",
                    "capacity": 400,
                    "sections": [
                        {"section": "Rang", "capacity": 400, "price_min": 1, "price_max": 6_000}
                    ],
                }
                for number in range(performances)
            ],
        }
        | data,
    }


def record(event: dict[str, Any]) -> tuple[bytes, bytes]:
    """Its key and value."""
    return str(event["subject"]).encode(), json.dumps(event, ensure_ascii=False).encode()
