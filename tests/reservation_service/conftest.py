"""The service on a real database: in this process for its rules, else served."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from flask.testing import FlaskClient

import migrations
from devstack.processes import Process
from devstack.state import free_port
from reservation_service.app import create_app
from reservation_service.config import Settings
from reservation_service.database import make_pool
from tests.conftest import RunProcess
from tests.databases import ReservationDatabase
from tests.reservation_service.house import ADMIN_TOKEN, SECRET_KEY, House, is_ready, open_house


@dataclass(frozen=True)
class Served:
    """A running `reservation-service serve`."""

    url: str
    port: int
    process: Process


class Serve(Protocol):
    """Starts the service; `env` is added to the house's; waits for /readyz unless told not to."""

    def __call__(
        self, *arguments: str, env: dict[str, str] | None = None, wait: bool = True
    ) -> Served: ...


class MakeClient(Protocol):
    """An application in this process, with settings by their field names."""

    def __call__(self, **settings: Any) -> FlaskClient: ...


@pytest.fixture
def house(reservation_database: ReservationDatabase) -> Iterator[House]:
    with open_house(reservation_database) as opened:
        yield opened


@pytest.fixture
def make_client(house: House) -> Iterator[MakeClient]:
    with ExitStack() as cleanup:

        def make(**settings: Any) -> FlaskClient:
            pool = cleanup.enter_context(make_pool(house.database.service_url, 4))
            known = {
                "database_url": house.database.service_url,
                "secret_key": SECRET_KEY,
                "admin_token": ADMIN_TOKEN,
            }
            app = create_app(
                Settings.model_validate(known | settings),
                pool,
                outdated_schemas=migrations.outdated("reservations"),
            )
            return app.test_client()

        yield make


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    return make_client()


@pytest.fixture
def serve(house: House, run_process: RunProcess) -> Serve:
    def start(*arguments: str, env: dict[str, str] | None = None, wait: bool = True) -> Served:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        ready: Callable[[], bool] | None = (lambda: is_ready(url)) if wait else None
        process = run_process(
            "reservation_service", "serve", "--port", str(port), *arguments,
            env=house.environment | (env or {}), ready=ready,
        )  # fmt: skip
        return Served(url, port, process)

    return start
