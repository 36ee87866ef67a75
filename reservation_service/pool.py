"""The pool of one worker, which tells the metrics how near to its end it is.

To be imported after the metrics know where their values live, so not by `serve` itself.
"""

import time
from typing import Any

from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from reservation_service import metrics
from reservation_service.database import Connection


class MeasuredPool(ConnectionPool[Connection]):
    """A pool that counts who has a connection, who waits for one, and who gets none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        metrics.POOL_MAX.set(self.max_size)

    def getconn(self, timeout: float | None = None) -> Connection:
        """Lend a connection.

        Raises:
            PoolTimeout, TooManyRequests: there was none in time, or too many wait.
        """
        asked_at_s = time.monotonic()
        try:
            connection = super().getconn(timeout)
        except (PoolTimeout, TooManyRequests):
            metrics.POOL_REFUSALS.inc()
            raise
        metrics.POOL_WAIT_SECONDS.observe(time.monotonic() - asked_at_s)
        metrics.POOL_BUSY.inc()
        return connection

    def putconn(self, conn: Connection) -> None:
        """Take a connection back."""
        metrics.POOL_BUSY.dec()
        super().putconn(conn)
