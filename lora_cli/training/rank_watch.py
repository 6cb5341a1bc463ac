"""Several processes watch each other: where one dies, the others say which, and end.

Without that they would wait: a collective operation of NCCL for hours, and one of gloo fails with
a traceback that names a port. Each process keeps a connection to the main process. The system
closes it when the process ends, however that happens; the main process passes the news on.
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

CONNECT_S = 10.0  # the port may be closed to other machines: then nobody watches
NOTICE_S = 3.0  # an operation that fails because of a death may fail before its news is here
GRACE_S = 10.0  # a process that hangs longer in an operation is ended


class Watch:
    """The connections of a process to the others.

    Args:
        accelerator: Which process this is, of how many.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.dead: int | None = None
        """Number of the process that has ended."""
        self._news, self._over = threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        if self.rank == 0:
            self._server = socket.create_server(("", 0), backlog=self.size)
            word = secrets.token_hex(8)  # so that nobody else is taken for a process of the run
            broadcast_object_list([self._server.getsockname()[1], word])
            threading.Thread(target=self._accept, args=(word,), daemon=True).start()
            return
        port, word = broadcast_object_list([None, None])
        with contextlib.suppress(OSError):
            host = os.environ.get("MASTER_ADDR", "localhost")
            connection = socket.create_connection((host, port), CONNECT_S)
            connection.settimeout(None)
            connection.sendall(f"{word} {self.rank}\n".encode())
            self._listen_to(0, connection)

    def _accept(self, word: str) -> None:
        """Take the connections of the others; runs in a thread of the main process."""
        assert self._server is not None
        while len(self._connections) < self.size - 1:
            try:
                connection, _ = self._server.accept()
                connection.settimeout(CONNECT_S)
                said, _, rank = connection.makefile().readline().partition(" ")
                connection.settimeout(None)
                known = said == word and rank.strip().isdigit()
            except OSError:
                if self._over.is_set():
                    return
                continue
            if known:
                self._listen_to(int(rank), connection)

    def _listen_to(self, rank: int, connection: socket.socket) -> None:
        self._connections[rank] = connection
        threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _listen(self, rank: int, connection: socket.socket) -> None:
        """Wait for a process to end, or to tell that another has; runs in a thread."""
        try:
            line = connection.makefile().readline().strip()
        except OSError:
            line = ""
        if line == "bye" or self._over.is_set():
            return
        self.dead = int(line) if line.isdigit() else rank
        self._news.set()
        if self.rank == 0:
            self._send(str(self.dead))
        if not self._over.wait(GRACE_S):  # the process hangs in an operation with the dead one
            print(self.error(), file=sys.stderr, flush=True)  # noqa: T201 - there is no other way
            os._exit(ResourceError.exit_code)

    def _send(self, what: str) -> None:
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.sendall(f"{what}\n".encode())

    def lost(self) -> bool:
        """Return whether another process has ended; waits for the news of it."""
        return self._news.wait(NOTICE_S)

    def error(self) -> ResourceError:
        """Return what the survivors say."""
        return ResourceError(
            f"process {self.dead} of {self.size} has ended, so process {self.rank} ends too",
            f"process {self.rank}",
            "its own message, or the launcher's, says why (without one: was its memory full?); "
            "then continue with `--resume`",
        )

    def leave(self, well: bool) -> None:
        """Close the connections.

        Args:
            well: Whether all of them have come to the end.
        """
        self._over.set()
        if well:
            self._send("bye")
        for end in (self._server, *self._connections.values()):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


@contextmanager
def watching(accelerator: Accelerator) -> Iterator[None]:
    """Let the processes watch each other within the context.

    Raises:
        ResourceError: In place of the error that the death of another process has caused.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch, well = Watch(accelerator), False
    try:
        yield
        well = True
    except LoraError:  # if all processes raise it, they end before anybody counts them as dead
        raise
    except Exception as error:
        if watch.lost():
            raise watch.error() from error
        raise
    finally:
        watch.leave(well)
