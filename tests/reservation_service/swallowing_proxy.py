"""A TCP proxy between a client and the service that can swallow answers."""

import select
import socket
import threading
from typing import Self

from devstack.processes import wait_until

CHUNK_BYTES = 65_536
TIMEOUT_S = 10.0


class SwallowingProxy:
    """Passes one request on, and keeps its answer for itself.

    `swallowed` is set when the service has begun to answer, which it does after COMMIT.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.swallowed = threading.Event()
        self._thread = threading.Thread(target=self._relay_once)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(TIMEOUT_S)

    def wait_swallowed(self) -> None:
        """Wait for the answer that nobody gets."""
        wait_until(self.swallowed.is_set, TIMEOUT_S, "the service's answer")

    def _relay_once(self) -> None:
        self._listener.settimeout(TIMEOUT_S)
        client, _ = self._listener.accept()
        with client, socket.create_connection(("127.0.0.1", self._target_port)) as service:
            # The client learns only that the connection broke, when the service is dead.
            while True:
                readable, _, _ = select.select([client, service], [], [], TIMEOUT_S)
                if service in readable:
                    if not _receive(service):
                        return
                    self.swallowed.set()
                elif client in readable:
                    service.sendall(_receive(client))
                else:
                    return


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(CHUNK_BYTES)
    except ConnectionResetError:
        return b""
