"""Let the processes of a run watch each other: if one dies, the others report which, and end.

Otherwise they would wait for hours in a collective operation of NCCL, or fail in one of gloo with a
traceback that only names a port. Each process keeps a connection to the main process. The operating
system closes it when the process ends for any reason, and the main process informs the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lora_cli.errors import LoraError, ResourceError

CONNECT_S = 10.0  # a firewall may block the port; the processes then do not watch each other
NOTICE_S = 3.0  # an operation may fail before the notice of a death arrives
GRACE_S = 10.0  # a process that hangs in an operation for longer is terminated


class Watch:
    """The connections of a process to the others.

    Args:
        accelerator: The rank of this process, and the number of processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.dead: int | None = None
        """The rank of the process that has died."""
        self._death_noticed, self._has_ended = threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        if self.rank == 0:
            self._server = socket.create_server(("", 0), backlog=self.size)
            token = secrets.token_hex(8)  # rejects connections that do not come from the run
            broadcast_object_list([self._server.getsockname()[1], token])
            threading.Thread(target=self._accept, args=(token,), daemon=True).start()
            return
        port, token = broadcast_object_list([None, None])
        with contextlib.suppress(OSError):
            host = os.environ.get("MASTER_ADDR", "localhost")
            connection = socket.create_connection((host, port), CONNECT_S)
            connection.settimeout(None)
            connection.sendall(f"{token} {self.rank}\n".encode())
            self._listen_to(0, connection)

    def _accept(self, token: str) -> None:
        """Accept the connections of the other processes; runs in a thread of the main process."""
        assert self._server is not None
        while len(self._connections) < self.size - 1:
            try:
                connection, _ = self._server.accept()
                connection.settimeout(CONNECT_S)
                received_token, _, rank = connection.makefile().readline().partition(" ")
                connection.settimeout(None)
                is_valid = received_token == token and rank.strip().isdigit()
            except OSError:
                if self._has_ended.is_set():
                    return
                continue
            if is_valid:
                self._listen_to(int(rank), connection)

    def _listen_to(self, rank: int, connection: socket.socket) -> None:
        self._connections[rank] = connection
        threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _listen(self, rank: int, connection: socket.socket) -> None:
        """Wait for a process to end, or to report that another has; runs in a thread."""
        try:
            line = connection.makefile().readline().strip()
        except OSError:
            line = ""
        if line == "bye" or self._has_ended.is_set():
            return
        self.dead = int(line) if line.isdigit() else rank
        self._death_noticed.set()
        if self.rank == 0:
            self._send(str(self.dead))
        # if this process does not end, it hangs in an operation with the dead one
        if not self._has_ended.wait(GRACE_S):
            print(self.error(), file=sys.stderr, flush=True)  # noqa: T201 - there is no other way
            os._exit(ResourceError.exit_code)

    def _send(self, message: str) -> None:
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.sendall(f"{message}\n".encode())

    def another_has_died(self) -> bool:
        """Return whether another process has died; waits for the notice."""
        return self._death_noticed.wait(NOTICE_S)

    def error(self) -> ResourceError:
        """Return the error for the surviving processes."""
        return ResourceError(
            f"process {self.dead} of {self.size} has ended, so process {self.rank} ends too",
            f"process {self.rank}",
            "its own message, or the launcher's, says why (without one: was its memory full?); "
            "then continue with `--resume`",
        )

    def leave(self, succeeded: bool) -> None:
        """Close the connections.

        Args:
            succeeded: Whether the run has ended without an error.
        """
        self._has_ended.set()
        if succeeded:
            self._send("bye")
        for endpoint in (self._server, *self._connections.values()):
            if endpoint is not None:
                with contextlib.suppress(OSError):
                    endpoint.shutdown(socket.SHUT_RDWR)
                endpoint.close()


@contextmanager
def watching(accelerator: Accelerator) -> Iterator[None]:
    """Let the processes watch each other within the context.

    Raises:
        ResourceError: Instead of the error that the death of another process has caused.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch, succeeded = Watch(accelerator), False
    try:
        yield
        succeeded = True
    except LoraError:  # the other processes raise it too, or notice that this one has ended
        raise
    except Exception as error:
        if watch.another_has_died():
            raise watch.error() from error
        raise
    finally:
        watch.leave(succeeded)
