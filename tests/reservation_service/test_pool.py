"""What the metrics tell of the connections, of one worker and of all that live."""

import os
import signal
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY
from psycopg_pool import PoolTimeout

from reservation_service.database import make_pool
from reservation_service.pool import MeasuredPool
from reservation_service.serve import THREADS_PER_WORKER
from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import House
from tests.waiting import wait_until


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"reservation_pool_{name}") or 0.0


def test_a_pool_tells_who_has_a_connection_who_waited_and_who_got_none(house: House) -> None:
    refused, waited = value("refusals_total"), value("wait_seconds_count")
    busy = value("busy_connections")
    with make_pool(house.database.service_url, 1, MeasuredPool) as pool:
        assert value("max_connections") == 1
        with pool.connection():
            assert value("busy_connections") == busy + 1
            with pytest.raises(PoolTimeout), pool.connection(0.05):
                pass
        assert value("busy_connections") == busy
    assert value("refusals_total") == refused + 1
    assert value("wait_seconds_count") == waited + 1


def test_a_killed_worker_is_counted_no_more_and_what_it_answered_still_is(
    serve: Serve, tmp_path: Path
) -> None:
    served = serve(env={"TMPDIR": str(tmp_path)})

    def told(name: str) -> float:
        text = httpx.get(f"{served.url}/metrics", timeout=20).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def live() -> set[int]:
        files = tmp_path.glob("*/gauge_livesum_*.db")
        return {int(file.stem.rpartition("_")[2]) for file in files}

    def all_told() -> bool:
        return told("reservation_pool_max_connections") == 2 * THREADS_PER_WORKER

    wait_until(all_told, 20, "both workers")
    answered, first_two = told("reservation_http_requests_total"), live()
    os.kill(max(first_two), signal.SIGKILL)
    wait_until(lambda: bool(live() - first_two), 20, "a third worker")
    wait_until(all_told, 20, "two workers again")
    assert len(live()) == 2
    assert told("reservation_http_requests_total") > answered
